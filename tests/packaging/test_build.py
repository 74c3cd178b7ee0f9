"""build.sh: two builds are the same byte for byte; what is in the wheel, the installer and the package.

Builds a copy of the repository without the embedded bundle, for a lane whose wheelhouse is the wheel of pip alone, so
that nothing but the tools of the build is fetched. packaging/prove_install.sh builds and installs the real lanes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "9.8.7"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("git") is None,
    reason="build.sh runs on Linux and takes the sources from git",
)
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb here")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    identity = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **identity},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, pip_wheel: Path) -> tuple[Path, Path]:
    """The outputs of two builds, of two clones in different places."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    unwanted = ("edgemed/bundles", "runs", "build", "dist", "answers")

    def ignored(where: str, names: list[str]) -> set[str]:
        here = Path(where).relative_to(ROOT).as_posix()
        found = {name for name in names if name.startswith(".") or name in ("__pycache__", "edgemed.egg-info")}
        if here == "tests":
            found |= set(names) - {"files"}
        return found | {name for name in names if f"{here}/{name}".removeprefix("./") in unwanted}

    shutil.copytree(ROOT, source, ignore=ignored)
    lock = source / "packaging" / "locks" / "tiny.txt"
    digest = hashlib.sha256(pip_wheel.read_bytes()).hexdigest()
    lock.write_text(f"# the wheel of pip alone\npip=={pip_wheel.name.split('-')[1]} --hash=sha256:{digest}\n")
    run("git", "init", "--quiet", source)
    run("git", "add", "--all", cwd=source)
    run("git", "commit", "--quiet", "--message", "a copy", cwd=source)
    outputs = []
    for name in ("one", "two"):
        clone = folder / name / "clone"
        run("git", "clone", "--quiet", source, clone)
        wheels = clone / ".cache" / "wheels" / f"tiny-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
        wheels.mkdir(parents=True)
        shutil.copy(pip_wheel, wheels)
        (wheels / "whole").touch()
        if outputs:  # the tools are the first clone's: they are locked, and this saves a download
            shutil.copytree(folder / "one/clone/.cache/build-tools", clone / ".cache/build-tools", symlinks=True)
        run(clone / "packaging" / "build.sh", "--out", folder / name / "out", "--version", VERSION, "tiny")
        outputs.append(folder / name / "out")
    return outputs[0], outputs[1]


def test_two_builds_are_the_same_byte_for_byte(built: tuple[Path, Path]) -> None:
    one, two = ((folder / "SHA256SUMS").read_text() for folder in built)
    assert one == two
    names = {line.split()[1] for line in one.splitlines()}
    assert names >= {f"edgemed-{VERSION}.tar.gz", f"edgemed-{VERSION}-py3-none-any.whl", f"edgemed-{VERSION}-tiny.run"}


def test_wheel_holds_no_test_no_script_of_this_folder_and_no_pickle(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0] / f"edgemed-{VERSION}-py3-none-any.whl") as archive:
        names = archive.namelist()
        assert {entry.date_time for entry in archive.infolist()} == {archive.infolist()[0].date_time}
    assert {name.split("/")[0] for name in names} == {"edgemed", f"edgemed-{VERSION}.dist-info"}
    assert not [name for name in names if re.search(r"(^|/)(tests?|packaging)/|\.(pkl|pickle|pt|pth|npz|so|sh)$", name)]


def test_sdist_builds_the_wheel_and_names_no_user(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0] / f"edgemed-{VERSION}.tar.gz") as archive:
        members = archive.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
    assert len({m.mtime for m in members}) == 1


def test_man_page_and_completions_are_what_the_command_line_says(built: tuple[Path, Path], tmp_path: Path) -> None:
    from edgemed.cli.verbs import VERBS

    share = unpack_installer(built[0], tmp_path) / "share"
    page = (share / "man" / "man1" / "edgemed.1").read_text(encoding="utf-8")
    assert f"edgemed {VERSION}" in page.splitlines()[0]
    for verb in VERBS:
        assert f".SS edgemed {verb}\n" in page
    assert "\\-\\-region REGION" in page
    assert ".SS edgemed models import\n" in page
    if shutil.which("groff"):
        warned = subprocess.run(
            ["groff", "-man", "-ww", "-Tutf8", "-z", "-"], input=page, text=True, capture_output=True
        )
        assert not [line for line in warned.stderr.splitlines() if "can't break line" not in line]
    for shell in ("bash", "zsh", "fish"):
        assert "_EDGEMED_COMPLETE" in (share / "completions" / f"edgemed.{shell}").read_text()


def unpack_installer(out: Path, folder: Path) -> Path:
    """Return the payload of the installer, cut off as its own script does it."""
    file = out / f"edgemed-{VERSION}-tiny.run"
    head = file.read_bytes()[:4096].decode("ascii", "ignore")
    size = re.search(r"^payload_bytes=(\d+)", head, re.MULTILINE)
    assert size is not None
    archive = folder / "payload.tar"
    archive.write_bytes(file.read_bytes()[-int(size[1]) :])
    assert f"payload_sha256={hashlib.sha256(archive.read_bytes()).hexdigest()}" in head
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "payload", filter="data")
    return folder / "payload"


def test_installer_hashes_every_file_and_locks_every_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    payload = unpack_installer(built[0], tmp_path)
    sums = dict(reversed(line.split("  ")) for line in (payload / "SHA256SUMS").read_text().splitlines())
    there = {path.relative_to(payload).as_posix() for path in payload.rglob("*") if path.is_file()}
    assert there == set(sums) | {"SHA256SUMS"}
    assert (payload / "requirements.txt").read_text().startswith(f"edgemed=={VERSION} --hash=sha256:")
    assert "require_signature = true" in (payload / "settings" / "config.toml").read_text()


def test_installer_that_lost_a_byte_is_refused(built: tuple[Path, Path], tmp_path: Path) -> None:
    whole = (built[0] / f"edgemed-{VERSION}-tiny.run").read_bytes()
    for damaged in (whole[:-1], whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]):
        (tmp_path / "damaged.run").write_bytes(damaged)
        command = ["sh", tmp_path / "damaged.run", "--user", "--prefix", tmp_path / "prefix"]
        done = subprocess.run(
            command, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, check=False
        )
        assert done.returncode == 22


@needs_dpkg
def test_package_is_roots_has_no_privileged_file_and_keeps_settings(built: tuple[Path, Path]) -> None:
    (package,) = built[0].glob("*.deb")
    listed = [line.split(maxsplit=5) for line in run("dpkg-deb", "--contents", package).splitlines()]
    assert {row[1] for row in listed} == {"root/root"}
    assert not [row for row in listed if re.search(r"[sStT]", row[0][1:]) or (row[0][8] == "w" and row[0][0] != "l")]
    names = {row[5] for row in listed}
    for name in ("lib/systemd/system/edgemed.service", "lib/sysusers.d/edgemed.conf", "share/man/man1/edgemed.1.gz"):
        assert f"./usr/{name}" in names
    for shell in ("bash-completion/completions/edgemed", "zsh/vendor-completions/_edgemed"):
        assert f"./usr/share/{shell}" in names
    assert run("dpkg-deb", "--field", package, "Version").strip() == VERSION
    kept = run("dpkg-deb", "--info", package, "conffiles").split()
    assert kept == sorted(
        name.removeprefix(".") for name in names if name.startswith("./etc/") and not name.endswith("/")
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_unit_is_hardened() -> None:
    unit = ROOT / "packaging" / "deb" / "edgemed.service"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(unit)], capture_output=True, text=True, check=False
    )
    score = re.search(r"exposure level for edgemed\.service: ([\d.]+)", done.stdout)
    if score is None:
        pytest.skip("this systemd-analyze cannot look at a unit offline (252 and newer can)")
    assert float(score[1]) <= 1.5


def test_the_example_of_a_node_is_one_that_a_node_takes() -> None:
    from edgemed.serve.settings import read_settings

    settings = read_settings(ROOT / "packaging" / "deb" / "node.toml")
    unit = (ROOT / "packaging" / "deb" / "edgemed.service").read_text()
    assert f"SocketBindAllow=tcp:{settings.port}" in unit
    assert f"StateDirectory={settings.folder.name}" in unit
