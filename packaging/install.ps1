# edgemed for Windows: install, roll back, uninstall, without a network.
# NOT RUN: those who wrote it had no Windows and no PowerShell. Try it on a machine that may break.
#
#   powershell -ExecutionPolicy Bypass -File install.ps1              install beside what is there, then switch to it
#   powershell -ExecutionPolicy Bypass -File install.ps1 -Rollback    back to the version before
#   powershell -ExecutionPolicy Bypass -File install.ps1 -Uninstall   bundles, settings and results stay
#     -Prefix FOLDER   default: %LOCALAPPDATA%\edgemed-app      -Python FILE   default: py -3.11, else python
#
# A version is a virtual environment PREFIX\VERSION-LANE. The text file PREFIX\current names the one in use and
# PREFIX\edgemed.cmd starts it, since links need rights on Windows. Codes: 1 usage, 22 a damaged installer, 40 cannot
# write, else the code of `edgemed doctor`.
param([string]$Prefix = "$env:LOCALAPPDATA\edgemed-app", [string]$Python = "", [switch]$Rollback, [switch]$Uninstall)
Set-StrictMode -Version 2
$ErrorActionPreference = "Stop"
$Payload = Split-Path -Parent $MyInvocation.MyCommand.Path

function Say($Text) { [Console]::Error.WriteLine("edgemed setup: $Text") }
function Die($Code, $Text) { Say $Text; exit $Code }
function Get-Named($Name) {
    $File = Join-Path $Prefix $Name
    if (Test-Path -LiteralPath $File) { (Get-Content -LiteralPath $File -Raw).Trim() } else { "" }
}
function Set-Named($Name, $Value) {
    $Part = Join-Path $Prefix "$Name.part"
    [IO.File]::WriteAllText($Part, $Value)
    Move-Item -LiteralPath $Part -Destination (Join-Path $Prefix $Name) -Force
}
function Switch-To($Version) {
    $Was = Get-Named "current"
    if ($Was -and $Was -ne $Version -and (Test-Path -LiteralPath "$Prefix\$Was\release")) { Set-Named "previous" $Was }
    Set-Named "current" $Version
    Set-Named "edgemed.cmd" "@`"%~dp0$Version\Scripts\edgemed.exe`" %*`r`n"
}
function Test-Ready($Version) {
    & "$Prefix\$Version\Scripts\edgemed.exe" doctor --device cpu
    if ($LASTEXITCODE) { Die $LASTEXITCODE "the doctor found $Version not ready; nothing was switched" }
}

if ($Uninstall) {
    if (Test-Path -LiteralPath $Prefix) {
        Get-ChildItem -LiteralPath $Prefix -Directory |
            Where-Object { Test-Path -LiteralPath "$($_.FullName)\pyvenv.cfg" } |
            Remove-Item -Recurse -Force
        foreach ($Name in "current", "previous", "edgemed.cmd", "install.ps1") {
            Remove-Item -LiteralPath "$Prefix\$Name" -Force -ErrorAction SilentlyContinue
        }
        if (-not (Get-ChildItem -LiteralPath $Prefix -Force)) { Remove-Item -LiteralPath $Prefix }
    }
    Say "edgemed is removed; bundles, settings, engines and results stay"
    exit 0
}
if ($Rollback) {
    $Back = Get-Named "previous"
    if (-not $Back -or -not (Test-Path -LiteralPath "$Prefix\$Back\release")) { Die 1 "there is no version before" }
    Test-Ready $Back
    Switch-To $Back
    Say "edgemed is $Back again; -Rollback goes forward"
    exit 0
}

if (-not (Test-Path -LiteralPath "$Payload\SHA256SUMS")) { Die 1 "there is nothing to install beside this script" }
foreach ($Line in Get-Content -LiteralPath "$Payload\SHA256SUMS") {
    $Wanted, $Name = $Line -split "  ", 2
    $File = Join-Path $Payload $Name
    if (-not (Test-Path -LiteralPath $File)) { Die 22 "$Name is missing; copy the installer again" }
    $Sum = (Get-FileHash -LiteralPath $File -Algorithm SHA256).Hash
    if ($Sum -ne $Wanted) { Die 22 "$Name is damaged; copy it again" }
}
$Version, $Lane, $WantedPython = (Get-Content -LiteralPath "$Payload\release") -split " "
$Name = "$Version-$Lane"
$Target = Join-Path $Prefix $Name
if (Test-Path -LiteralPath "$Target\release") {
    Say "$Name is already here"
} else {
    $Found = $null
    $Candidates = if ($Python) { , @($Python) } else { @("py", "-$WantedPython"), @("python") }
    foreach ($Candidate in $Candidates) {
        $Arguments = @($Candidate | Select-Object -Skip 1)
        $Ask = "import sys, venv; print('%d.%d' % sys.version_info[:2], sys.maxsize > 2**32)"
        try { $Is = & $Candidate[0] @Arguments -I -c $Ask } catch { continue }
        if ($Is -eq "$WantedPython True") { $Found = $Candidate; break }
    }
    if (-not $Found) { Die 1 "no 64-bit Python $WantedPython was found; install it, or name one with -Python" }
    New-Item -ItemType Directory -Force -Path $Prefix | Out-Null
    if (Test-Path -LiteralPath $Target) { Remove-Item -LiteralPath $Target -Recurse -Force }
    Say "installing $Name into $Target"
    $Arguments = @($Found | Select-Object -Skip 1)
    & $Found[0] @Arguments -I -m venv --without-pip $Target
    if ($LASTEXITCODE) { Die 40 "the environment could not be made" }
    $Pip = (Get-ChildItem -LiteralPath "$Payload\wheels" -Filter "pip-*.whl").FullName
    & "$Target\Scripts\python.exe" -I "$Pip\pip" --isolated --disable-pip-version-check --no-cache-dir install --quiet `
        --no-index --find-links "$Payload\wheels" --only-binary :all: --require-hashes --no-deps `
        --requirement "$Payload\requirements.txt"
    if ($LASTEXITCODE) { Die 40 "the packages could not be installed; the reason is above" }
    Copy-Item -LiteralPath "$Payload\share" -Destination $Target -Recurse
    Copy-Item -LiteralPath "$Payload\release" -Destination "$Target\release"
}
$Settings = if ($env:EDGEMED_HOME) { $env:EDGEMED_HOME } else { "$env:APPDATA\edgemed" }
New-Item -ItemType Directory -Force -Path $Settings | Out-Null
foreach ($File in Get-ChildItem -LiteralPath "$Payload\settings" -File) {
    if (Test-Path -LiteralPath "$Settings\$($File.Name)") { continue }
    Copy-Item -LiteralPath $File.FullName -Destination $Settings
}
if (Test-Path -LiteralPath "$Payload\bundles") {
    foreach ($Bundle in Get-ChildItem -LiteralPath "$Payload\bundles" -Directory) {
        & "$Target\Scripts\edgemed.exe" models import $Bundle.FullName --replace
        if ($LASTEXITCODE) {
            & "$Target\Scripts\edgemed.exe" models show $Bundle.Name | Out-Null
            if ($LASTEXITCODE) { Die 80 "bundle $($Bundle.Name) could not be imported" }
            Say "the bundle $($Bundle.Name) that is already here stays"
        }
    }
}
Test-Ready $Name
Copy-Item -LiteralPath "$Payload\install.ps1" -Destination "$Prefix\install.ps1" -Force
Switch-To $Name
$Kept = @((Get-Named "current"), (Get-Named "previous"))
Get-ChildItem -LiteralPath $Prefix -Directory |
    Where-Object { $Kept -notcontains $_.Name -and (Test-Path -LiteralPath "$($_.FullName)\pyvenv.cfg") } |
    Remove-Item -Recurse -Force
Say "edgemed $Version ($Lane) is ready: $Prefix\edgemed.cmd"
