"""Bundles of the whole machine: they go before a user's own, all may read them, nobody else may change them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from edgemed import bundle as bundles
from edgemed.bundle import find_bundle, install_bundle, list_bundles, open_bundle, remove_bundle, sign_bundle
from edgemed.errors import BundleError, CannotRead, CannotWrite, EdgemedError, SignatureError

OTHER_USER = 54321

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the mode of a file has no such rights")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that bundles.shared names; it is not made."""
    monkeypatch.setenv("EDGEMED_BUNDLES_SHARED", str(tmp_path / "machine" / "bundles"))
    return tmp_path / "machine" / "bundles"


def test_all_may_read_it_and_its_owner_alone_may_write_whatever_the_umask_is(hospital: Any, shared: Path) -> None:
    before = os.umask(0o077)
    try:
        installed = install_bundle(hospital.template, shared=True)
    finally:
        os.umask(before)
    assert installed.path == shared / "tiny"
    there = [shared.parent, shared, *shared.rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in there if path.is_dir()} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in there if path.is_file()} == {0o644}
    assert len([path for path in there if path.is_file()]) == 7


def test_a_signature_that_the_site_adds_to_it_is_for_all_to_read(hospital: Any, shared: Path) -> None:
    install_bundle(hospital.template, shared=True)
    before = os.umask(0o077)
    try:
        sign_bundle("tiny", hospital.private["vendor-2"], "vendor")
    finally:
        os.umask(before)
    assert (shared / "tiny" / "bundle.sig").stat().st_mode & 0o777 == 0o644


def test_its_name_means_it_for_every_user(
    hospital: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = install_bundle(hospital.make(tmp_path / "old", versions={"bundle": "1.0"}).path)
    assert find_bundle("tiny") == own.path
    install_bundle(hospital.template, shared=True)
    monkeypatch.chdir(own.path.parent)
    assert open_bundle("tiny").path == shared / "tiny"
    assert open_bundle("./tiny").manifest.version == (1,)
    (listed,) = (listed for listed in list_bundles() if not listed.embedded)
    assert (listed.place, listed.path, listed.hides) == ("shared", shared / "tiny", own.path)


def test_an_older_one_with_good_signatures_does_not_take_its_place(
    hospital: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = hospital.make(tmp_path / "old", versions={"bundle": "1.0"}).path
    hospital.sign(old, "vendor", "site")
    monkeypatch.setattr(bundles, "read_policy", lambda: hospital.policy)
    install_bundle(old)
    install_bundle(hospital.template, shared=True)
    assert open_bundle("tiny").manifest.version == (1, 2)
    with pytest.raises(BundleError, match="a bundle of the machine, which goes before; pass another name"):
        install_bundle(old, replace=True, force=True)
    assert install_bundle(old, "tiny-old").manifest.version == (1,)
    (shared / "tiny" / "bundle.sig").unlink()
    with pytest.raises(SignatureError):  # and is no way round the policy
        open_bundle("tiny")


def test_neither_an_older_one_nor_the_name_of_an_embedded_one_is_taken(
    hospital: Any, shared: Path, tmp_path: Path
) -> None:
    install_bundle(hospital.template, shared=True)
    old = hospital.make(tmp_path / "old", versions={"bundle": "1.0"}).path
    with pytest.raises(BundleError, match=r"the installed tiny has 1\.2; pass --force"):
        install_bundle(old, replace=True, shared=True)
    with pytest.raises(CannotWrite, match="exists already"):
        install_bundle(hospital.template, shared=True)
    with pytest.raises(BundleError, match="embedded"):
        install_bundle(old, "nano", shared=True)
    assert install_bundle(old, replace=True, force=True, shared=True).manifest.version == (1,)
    with pytest.raises(BundleError, match="which --shared removes"):
        remove_bundle("tiny")
    remove_bundle("tiny", shared=True)
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "tiny", "tiny/graphs", "tiny/graphs/decoder.onnx", "tiny/bundle.json"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_to_is_refused(hospital: Any, shared: Path, inside: str, mode: int) -> None:
    install_bundle(hospital.template, shared=True)
    path = shared / inside
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(CannotRead, match=r"others may write to it.*chmod go-w"):
        open_bundle("tiny")
    with pytest.raises(CannotRead):
        open_bundle(shared / "tiny")
    if not inside:
        for step in (list_bundles, lambda: find_bundle("other"), lambda: install_bundle(hospital.template, "x")):
            with pytest.raises(CannotRead):
                step()
    assert find_bundle("nano").name == "nano"


def test_a_folder_that_is_none_is_told_and_one_that_is_not_there_yet_has_no_bundles(
    hospital: Any, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [listed.name for listed in list_bundles()] == ["nano"]
    shared.parent.mkdir()
    shared.touch()
    with pytest.raises(CannotRead, match="no folder that this user may read"):
        list_bundles()
    monkeypatch.delenv("EDGEMED_BUNDLES_SHARED")
    with pytest.raises(EdgemedError, match=r"bundles\.shared is not set") as caught:
        install_bundle(hospital.template, shared=True)
    assert caught.value.exit_code == 1


def _can_be_another_user() -> bool:
    """Return whether this is root, and not of a user namespace that has no other user."""
    users = Path("/proc/self/uid_map")
    return os.geteuid() == 0 and (not users.is_file() or int(users.read_text().split()[2]) > OTHER_USER)


@pytest.mark.skipif(not _can_be_another_user(), reason="only root of a whole machine can become another user")
def test_another_user_reads_it_and_changes_nothing(hospital: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        shared = Path(name) / "bundles"
        monkeypatch.setenv("EDGEMED_BUNDLES_SHARED", str(shared))
        monkeypatch.setenv("EDGEMED_HOME", str(Path(name) / "home"))
        monkeypatch.setattr("edgemed.config.system_file", lambda: Path(name) / "none.toml")
        install_bundle(hospital.template, shared=True)
        (shared / ".tiny.abcdefgh.part").mkdir(0o700)  # of an import that goes on
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgroups([])
                os.setgid(OTHER_USER)
                os.setuid(OTHER_USER)
                assert [listed.name for listed in list_bundles()] == ["nano", "tiny"]
                assert open_bundle("tiny").path == shared / "tiny"
                for step in (
                    lambda: install_bundle(shared / "tiny", "more", shared=True),
                    lambda: install_bundle(shared / "tiny", replace=True, shared=True),
                    lambda: remove_bundle("tiny", shared=True),
                ):
                    with pytest.raises(CannotWrite):
                        step()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert open_bundle("tiny").manifest.name == "tiny"
