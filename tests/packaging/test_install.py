"""install.sh: install, upgrade, rollback, uninstall, and what it refuses.

The installed package is a stand-in of one module, so that each step takes a second; packaging/prove_install.sh does the
same with the real one in a Debian without a network. Everything else is real: the wheel, pip from its wheel, hashes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64" or shutil.which("flock") is None,
    reason="the installer is for x86-64 Linux with util-linux",
)

PROGRAM = """
import os, sys
VERSION, READY = {version!r}, {ready!r}
def main():
    if sys.argv[1:2] == ["doctor"] and not READY:
        return 82
    print(VERSION, *sys.argv[1:])
"""


def write_wheel(folder: Path, version: str, ready: bool) -> Path:
    info = f"edgemed-{version}.dist-info"
    files = {
        "edgemed.py": PROGRAM.format(version=version, ready=ready),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: edgemed\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nedgemed = edgemed:main\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text)}\n"
    path = folder / f"edgemed-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_payload(pip: Path, folder: Path, version: str, *, ready: bool = True) -> Path:
    """Return the setup script of a payload as build.sh lays it out."""
    for name in ("wheels", "settings", "share"):
        (folder / name).mkdir(parents=True)
    shutil.copy(pip, folder / "wheels")
    wheel = write_wheel(folder / "wheels", version, ready)
    (folder / "requirements.txt").write_text(f"edgemed=={version} --hash=sha256:{sha256(wheel)}\n")
    (folder / "settings" / "config.toml").write_text("[bundles]\nrequire_signature = true\n")
    (folder / "share" / "sample").write_text("sample")
    (folder / "release").write_text(f"{version} cpu {sys.version_info.major}.{sys.version_info.minor}\n")
    shutil.copy(ROOT / "packaging" / "install.sh", folder / "setup")
    seal(folder)
    return folder / "setup"


def seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


class Machine:
    """A home of its own, and the installer run in it."""

    def __init__(self, folder: Path, pip: Path) -> None:
        self.folder, self.pip = folder, pip
        self.home = folder / "home"
        self.home.mkdir()
        self.prefix = self.home / ".local" / "share" / "edgemed-app"

    def payload(self, version: str, *, ready: bool = True) -> Path:
        return make_payload(self.pip, self.folder / version, version, ready=ready)

    def run(self, script: Path, *options: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
        environment = {"HOME": str(self.home), "PATH": path}
        command = ["sh", str(script), "--user", *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def version(self) -> str:
        done = subprocess.run([self.prefix / "current/bin/edgemed"], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def files(self) -> set[str]:
        return {path.relative_to(self.home).as_posix() for path in self.home.rglob("*") if not path.is_dir()}


@pytest.fixture
def machine(tmp_path: Path, pip_wheel: Path) -> Machine:
    return Machine(tmp_path, pip_wheel)


def test_install_upgrade_rollback_uninstall(machine: Machine) -> None:
    for version in ("1.0", "2.0", "3.0"):
        done = machine.run(machine.payload(version))
        assert done.returncode == 0, done.stderr
        assert machine.version() == version
        settings = machine.home / ".config/edgemed/config.toml"
        if version == "1.0":
            settings.write_text("# mine\n")
    assert not (machine.prefix / "1.0-cpu").exists(), "more than two versions are kept"
    assert os.readlink(machine.home / ".local/bin/edgemed") == str(machine.prefix / "current/bin/edgemed")
    setup = machine.prefix / "setup"
    for expected in ("2.0", "3.0", "2.0"):
        assert machine.run(setup, "--rollback").returncode == 0
        assert machine.version() == expected
    assert machine.run(setup, "--status").stdout.split() == ["2.0-cpu", "current", "3.0-cpu", "previous"]
    assert settings.read_text() == "# mine\n"
    assert machine.run(setup, "--uninstall").returncode == 0
    assert machine.files() == {".config/edgemed/config.toml"}
    assert not machine.prefix.exists()


def test_the_environment_has_the_package_alone(machine: Machine) -> None:
    assert machine.run(machine.payload("1.0")).returncode == 0
    (packages,) = (machine.prefix / "current").glob("lib/python3*/site-packages")
    assert {path.name for path in packages.iterdir()} == {"edgemed.py", "edgemed-1.0.dist-info", "__pycache__"}
    assert (machine.prefix / "current/share/sample").is_file()


def test_a_version_that_the_doctor_finds_not_ready_is_not_switched_to(machine: Machine) -> None:
    assert machine.run(machine.payload("1.0")).returncode == 0
    done = machine.run(machine.payload("2.0", ready=False))
    assert done.returncode == 82
    assert "nothing was switched" in done.stderr
    assert machine.version() == "1.0"
    assert machine.run(machine.prefix / "setup", "--rollback").returncode == 1


@pytest.mark.parametrize("file", ["wheels/edgemed-2.0-py3-none-any.whl", "requirements.txt", "setup", "release"])
def test_a_changed_file_is_refused(machine: Machine, tmp_path: Path, file: str) -> None:
    script = machine.payload("2.0")
    with open(tmp_path / "2.0" / file, "ab") as stream:
        stream.write(b"#")
    done = machine.run(script)
    assert done.returncode == 22
    assert "damaged" in done.stderr
    assert not (machine.prefix / "current").exists()


def test_a_wheel_that_the_lock_does_not_name_is_refused_by_pip(machine: Machine, tmp_path: Path) -> None:
    script = machine.payload("2.0")
    write_wheel(tmp_path / "2.0" / "wheels", "2.0", False)
    seal(tmp_path / "2.0")
    done = machine.run(script)
    assert done.returncode == 40
    assert "HASHES" in done.stderr
    assert not (machine.prefix / "2.0-cpu").exists()


def test_half_an_installation_is_made_anew(machine: Machine) -> None:
    script = machine.payload("1.0")
    assert machine.run(script).returncode == 0
    (machine.prefix / "1.0-cpu/release").unlink()  # what a kill before the last step leaves
    (machine.prefix / "1.0-cpu/bin/edgemed").unlink()
    assert machine.run(script).returncode == 0
    assert machine.version() == "1.0"


def test_another_python_is_refused(machine: Machine, tmp_path: Path) -> None:
    script = machine.payload("1.0")
    (tmp_path / "1.0" / "release").write_text("1.0 cpu 3.7\n")
    seal(tmp_path / "1.0")
    done = machine.run(script)
    assert done.returncode == 1
    assert "Python 3.7" in done.stderr


def test_what_lies_beside_in_the_prefix_stays(machine: Machine) -> None:
    assert machine.run(machine.payload("1.0")).returncode == 0
    for name in ("notes.txt", "own/data"):
        (machine.prefix / name).parent.mkdir(exist_ok=True)
        (machine.prefix / name).write_text("mine")
    done = machine.run(machine.prefix / "setup", "--uninstall")
    assert "holds other files" in done.stderr
    assert {name for name in machine.files() if "edgemed-app" in name} == {
        ".local/share/edgemed-app/notes.txt",
        ".local/share/edgemed-app/own/data",
    }


def test_a_command_of_someone_else_is_not_replaced(machine: Machine) -> None:
    own = machine.home / ".local/bin/edgemed"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert machine.run(machine.payload("1.0")).returncode == 0
    assert own.read_text() == "mine"


@pytest.mark.parametrize("options", [("--no-such",), ("--prefix",), ("--rollback",)])
def test_wrong_usage_is_told(machine: Machine, options: tuple[str, ...]) -> None:
    assert machine.run(ROOT / "packaging" / "install.sh", *options).returncode == 1
