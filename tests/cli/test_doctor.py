"""`edgemed doctor`: a good machine is ready, what is broken is named with its code, and a missing GPU is no failure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemed import config, keys, memory, nvidia
from edgemed.backends import engine_build
from edgemed.backends.engine_cache import engines_folder, write_cached
from edgemed.bundle import open_bundle
from edgemed.cli import doctor, main
from edgemed.nvidia import Driver, GpuState

Captured = pytest.CaptureFixture[str]
GPU = GpuState(0, "A GPU", "8.9", 24 << 30, 20 << 30)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the user's bundles and engines, and no NVIDIA driver."""
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(nvidia, "ask_driver", lambda: None)
    return tmp_path / "home"


def told(capsys: Captured, *options: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Return the checks by name, after the command ended with `code`."""
    assert main(["doctor", "--json", *options]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "edgemed.doctor/1"
    assert answer["ready"] is (code == 0)
    return {check["name"]: check for check in answer["checks"]}


def test_this_machine_is_ready(capsys: Captured) -> None:
    checks = told(capsys)
    assert list(checks) == [*doctor.CHECKS, "bundle nano", "engine cache"]
    assert all(check["ready"] for check in checks.values())
    assert checks["onnxruntime"]["details"]["computed"] == ["CPUExecutionProvider"]
    assert checks["bundle nano"]["details"]["runs"] == ["onnxruntime on CPU"]
    assert checks["bundle nano"]["details"]["needed_bytes"] > 300e6


def test_a_missing_onnxruntime_is_code_82_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["doctor"]) == 82
    assert "edgemed[cpu]" in capsys.readouterr().out


def test_too_little_memory_for_the_bundle_is_code_4(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100 << 20)
    assert "100 MiB are free" in told(capsys, code=4)["bundle nano"]["advice"]


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def break_down(facts: doctor.Facts) -> doctor.Check:
        raise RuntimeError("broken library")

    monkeypatch.setitem(doctor.CHECKS, "font", break_down)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  font" in out
    assert "ok    decoders" in out


# --- keys -------------------------------------------------------------------------------------------------------------


class Keys:
    """A root key, a key of the vendor, and a list of keys in the configuration of the user."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        self.file = home / "keys.json"
        self.root, self.vendor = (self._made(home / name) for name in ("root", "vendor"))
        self.settings = home / "config.toml"
        self.set('require_signature = true\nrequired_roles = ["vendor"]')

    @staticmethod
    def _made(stem: Path) -> Any:
        keys.write_key_pair(stem)
        return keys.read_private_key(f"{stem}.key.pem")

    def set(self, more: str) -> None:
        root = keys.key_id(keys.public_bytes(self.root))
        self.settings.write_text(f'[bundles]\ntrusted_keys = "keys.json"\nroot_keys = ["{root}"]\n{more}\n')

    def write(self, not_after: str = "", not_before: str = "", issued: str = "2026-01-01", role: str = "vendor") -> str:
        trusted = keys.TrustedKey(keys.public_bytes(self.vendor), role, not_before, not_after)
        listed = keys.KeyList(0, "").changed([trusted], today=issued)
        self.file.write_bytes(keys.key_list_bytes(listed, self.root))
        return keys.key_id(trusted.public)


@pytest.fixture
def trusted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setattr(config, "system_file", lambda: tmp_path / "none.toml")
    monkeypatch.setattr(keys, "today_iso", lambda: "2026-11-22")
    return Keys(home)


def test_keys_that_count_are_told(trusted: Keys, capsys: Captured) -> None:
    key = trusted.write("2027-01-22")
    check = told(capsys)["keys"]
    assert (check["code"], check["advice"], check["main"]) == (0, "", False)
    assert "a signature of vendor is required; list 1 of 2026-01-01: 1 of 1 keys count" in check["found"]
    assert check["details"]["keys"] == {key: "counts"}


@pytest.mark.parametrize("last", ["2026-11-22", "2027-01-21"])
def test_a_key_that_expires_within_60_days_is_a_note(trusted: Keys, capsys: Captured, last: str) -> None:
    trusted.write(last)
    check = told(capsys)["keys"]
    assert (check["code"], list(check["details"]["keys"].values())) == (0, ["expires soon"])
    assert f"counts until {last}" in check["advice"]
    assert main(["doctor"]) == 0
    assert "note  keys" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "state", "advice"),
    [
        ({"not_after": "2026-11-21"}, "expired", "counted until 2026-11-21"),
        ({"not_before": "2026-11-23"}, "not yet", "no vendor key is left"),
        ({"role": "site"}, "counts", "no vendor key is left"),
        ({"issued": "2026-11-23", "not_after": "2026-11-22"}, "expired", "set the clock"),
    ],
)
def test_no_key_left_is_told_and_stops_no_embedded_bundle(
    trusted: Keys, capsys: Captured, change: dict[str, str], state: str, advice: str
) -> None:
    trusted.write(**change)
    check = told(capsys)["keys"]
    assert (check["code"], list(check["details"]["keys"].values())) == (81, [state])
    assert advice in check["advice"]


def test_a_list_that_is_missing_damaged_or_not_set_is_told(trusted: Keys, capsys: Captured) -> None:
    assert "No such file" in told(capsys)["keys"]["advice"]
    trusted.write()
    trusted.file.write_bytes(trusted.file.read_bytes().replace(b"vendor", b"vendos"))
    assert "was changed after" in told(capsys)["keys"]["advice"]
    trusted.file.unlink()
    trusted.file.mkdir()
    assert "cannot read" in told(capsys)["keys"]["advice"]
    trusted.settings.write_text("[bundles]\nrequire_signature = true\n")
    check = told(capsys)["keys"]
    assert (check["code"], check["advice"][:25]) == (81, "set bundles.trusted_keys ")
    trusted.settings.write_text("")
    assert told(capsys)["keys"]["code"] == 0


def test_a_bundle_that_the_policy_refuses_is_code_81_where_it_is_the_main_job(
    trusted: Keys, tiny_native: ModuleType, home: Path, capsys: Captured
) -> None:
    trusted.write()
    tiny_native.make(home / "bundles" / "other", "The liver is not visible.")
    assert told(capsys)["bundle other"]["code"] == 81
    assert told(capsys, "--bundle", "other", code=81)["keys"]["code"] == 0


# --- the machine's bundles --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="the mode of a file has no such rights")
def test_bundles_of_the_machine_are_told_and_a_folder_open_to_others_is_a_note(
    tiny_native: ModuleType, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert "bundles.shared" in told(capsys)["shared bundles"]["found"]
    shared = tmp_path / "machine"
    monkeypatch.setenv("EDGEMED_BUNDLES_SHARED", str(shared))
    for folder in (shared, home / "bundles"):
        tiny_native.make(folder / "other", "The liver is not visible.")
    checks = told(capsys, "--bundle", "other")
    assert checks["shared bundles"]["details"] == {"folder": str(shared), "bundles": ["other"]}
    assert "other goes before the one in" in checks["shared bundles"]["advice"]
    shared.chmod(0o777)
    assert told(capsys)["shared bundles"]["code"] == 20
    assert "chmod go-w" in told(capsys, "--bundle", "other", code=20)["bundle other"]["advice"]


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no user ids here")
def test_a_folder_that_others_may_change_is_told_and_is_no_failure(home: Path, capsys: Captured) -> None:
    (home / "bundles").mkdir(parents=True)
    (home / "bundles").chmod(0o777)
    assert "chmod 700" in told(capsys)["disk"]["advice"]
    (home / "bundles").chmod(0o700)
    assert not told(capsys)["disk"]["advice"]


def test_a_full_disk_is_told_and_the_main_job_can_still_run(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    assert told(capsys)["disk"]["code"] == 40


# --- GPU --------------------------------------------------------------------------------------------------------------


def test_no_gpu_is_information_unless_one_is_asked_for(capsys: Captured) -> None:
    assert told(capsys)["gpu"]["found"] == "no NVIDIA GPU: the CPU is used"
    assert "driver" in told(capsys, "--device", "gpu", code=82)["gpu"]["advice"]


def test_a_driver_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(nvidia, "ask_driver", lambda: Driver("13.0", (), "it gave no answer in 5 s"))
    check = told(capsys)["gpu"]
    assert "no answer in 5 s" in check["found"]
    assert "nvidia-smi" in check["advice"]


def test_gpus_are_named_and_another_number_is_code_82(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(nvidia, "ask_driver", lambda: Driver("13.0", (GPU,)))
    assert "gpu:0 A GPU (8.9), 20480 of 24576 MiB free" in told(capsys, "--device", "cpu")["gpu"]["found"]
    assert "there is no GPU 3" in told(capsys, "--device", "gpu:3", code=82)["gpu"]["advice"]


def test_a_gpu_that_is_full_is_code_83(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    full = GpuState(0, "A GPU", "8.9", 24 << 30, 1 << 20)
    monkeypatch.setattr(nvidia, "ask_driver", lambda: Driver("13.0", (full,)))
    monkeypatch.setattr(engine_build, "find_library", lambda: ModuleType("tensorrt_rtx"))
    monkeypatch.setattr(engine_build, "library_version", lambda library: "tensorrt_rtx 1")
    assert "GPU 0 has 1 MiB free" in told(capsys, "--device", "gpu", code=83)["bundle nano"]["advice"]


def test_a_gpu_that_no_library_can_use_is_code_82(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    old = GpuState(0, "A GPU", "6.1", 24 << 30, 20 << 30)
    monkeypatch.setattr(nvidia, "ask_driver", lambda: Driver("13.0", (old,)))
    assert "edgemed[gpu-ort]" in told(capsys, "--device", "gpu", code=82)["engines"]["advice"]


# --- bundles and engines ----------------------------------------------------------------------------------------------


def test_a_damaged_bundle_is_told_and_stops_only_its_own_job(
    tiny_native: ModuleType, home: Path, capsys: Captured
) -> None:
    bundle = tiny_native.make(home / "bundles" / "other", "The liver is not visible.")
    assert told(capsys, "--bundle", "other")["bundle other"]["ready"]
    bundle.graph_path("decoder").write_bytes(b"changed")
    assert told(capsys)["bundle other"]["code"] == 80
    assert "decoder.onnx" in told(capsys, "--bundle", "other", code=80)["bundle other"]["advice"]


def test_an_unknown_bundle_is_code_80(capsys: Captured) -> None:
    assert "no-such" in told(capsys, "--bundle", "no-such", code=80)["bundle no-such"]["advice"]


def test_engines_are_counted_as_valid_stale_and_tampered(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(engine_build, "find_library", lambda: ModuleType("tensorrt_rtx"))
    monkeypatch.setattr(engine_build, "library_version", lambda library: "tensorrt_rtx 1")
    nano = open_bundle("nano")

    def write(role: str, target: str, library: str) -> Path:
        key = engine_build.graph_key(nano.graph_path(role), nano.spec(role), target, library)
        return write_cached(engines_folder(), key, b"engine" * 100)

    write("decoder", "any", "tensorrt_rtx 1")
    write("decoder", "sm_89", "tensorrt_rtx 1")
    write("projector", "any", "tensorrt_rtx 0.9")
    changed = write("vision_encoder", "any", "tensorrt_rtx 1")
    changed.write_bytes(changed.read_bytes()[:-1] + b"!")
    os.mkfifo(engines_folder() / "waits.engine")
    check = told(capsys)["engine cache"]
    assert check["details"] == {"valid": 2, "stale": 1, "tampered": 2}
    assert changed.name in check["advice"]
