"""`edgemed models`: list, show, verify, import, remove, against a small bundle made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemed.bundle import open_bundle, write_bundle
from edgemed.cli import main
from edgemed.errors import BundleError
from edgemed.graphs import GraphSpec, TensorSpec

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one graph; imported bundles go below tmp_path."""
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    image = (TensorSpec("image", "float32", (1, 3, 4, 4)),)
    write_bundle(
        tmp_path / "bundle",
        name="tiny",
        family="native",
        graphs={"vision_encoder": GraphSpec("vision_encoder", image, (TensorSpec("features", "float32", (1, 2)),))},
        files={"graphs/vision_encoder.onnx": b"\x08\x0a\x12\x04tiny", "reports/card.md": "# 小模型\n".encode()},
        precision={"vision_encoder": "fp32"},
        licences={"weights": "Apache-2.0"},
    )
    return tmp_path / "bundle"


def test_a_bundle_is_imported_listed_shown_and_removed(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "import", str(bundle)]) == 0
    assert capsys.readouterr().out.startswith("imported tiny, sha256 ")
    assert main(["models", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows["tiny"] == {
        "name": "tiny",
        "family": "native",
        "precision": {"vision_encoder": "fp32"},
        "calibrated": False,
        "size_bytes": 20,
        "embedded": False,
        "place": "user",
        "folder": str(bundle.parent / "home" / "bundles" / "tiny"),
        "hides": None,
        "problem": None,
    }
    assert main(["models", "show", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "licence of weights" in shown
    assert shown.endswith("# 小模型\n")
    assert main(["models", "rm", "tiny"]) == 0
    assert main(["models", "list"]) == 0
    assert "tiny" not in capsys.readouterr().out.replace("removed tiny", "")


def test_verify_tells_every_problem_in_a_line(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "verify", str(bundle)]) == 0
    (bundle / "reports" / "card.md").write_text("other")
    (bundle / "graphs" / "vision_encoder.onnx").unlink()
    (bundle / "surplus").symlink_to("/etc/hostname")
    (bundle / "reports" / "more.txt").write_text("unknown")
    capsys.readouterr()
    assert main(["models", "verify", str(bundle)]) == 80
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1:4] for line in lines] == [
        ["reports/more.txt", "is", "not"],
        ["surplus", "is", "a"],
        ["graphs/vision_encoder.onnx", "is", "missing;"],
        ["reports/card.md", "has", "sha256"],
    ]


def test_verify_in_json(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "verify", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    (bundle / "graphs" / "vision_encoder.onnx").unlink()
    assert main(["models", "verify", str(bundle), "--json"]) == 80
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["problems"]) == ("tiny", ["graphs/vision_encoder.onnx is missing"])


def test_verify_refuses_what_opening_refuses(bundle: Path) -> None:
    (bundle / "graphs" / "vision_encoder.onnx").unlink()
    with pytest.raises(BundleError):
        open_bundle(bundle)
    assert main(["models", "verify", str(bundle)]) == 80


def test_a_damaged_bundle_is_listed_with_its_problem(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "import", str(bundle), "--name", "damaged"]) == 0
    (bundle.parent / "home" / "bundles" / "damaged" / "bundle.json").write_text("{")
    assert main(["models", "list"]) == 0
    assert "not JSON" in capsys.readouterr().out


def test_a_bundle_of_the_machine_is_imported_listed_and_removed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert main(["models", "import", str(bundle), "--shared"]) == 1
    assert "bundles.shared is not set" in capsys.readouterr().err
    monkeypatch.setenv("EDGEMED_BUNDLES_SHARED", str(bundle.parent / "machine"))
    assert main(["models", "import", str(bundle)]) == 0
    assert main(["models", "import", str(bundle), "--shared"]) == 0
    capsys.readouterr()
    assert main(["models", "list"]) == 0
    own = bundle.parent / "home" / "bundles" / "tiny"
    assert f"shared, goes before {own}\n" in capsys.readouterr().out
    assert main(["models", "list", "--json"]) == 0
    row = next(row for row in json.loads(capsys.readouterr().out)["models"] if row["name"] == "tiny")
    folders = {"folder": str(bundle.parent / "machine" / "tiny"), "hides": str(own)}
    assert {"place": "shared", **folders}.items() <= row.items()
    assert main(["models", "rm", "tiny"]) == 0
    assert main(["models", "rm", "tiny"]) == 80
    assert "which --shared removes" in capsys.readouterr().err
    assert main(["models", "rm", "tiny", "--shared"]) == 0
    assert main(["models", "show", "tiny"]) == 80


def test_a_folder_here_is_imported_and_not_the_installed_bundle_of_its_name(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("EDGEMED_BUNDLES_SHARED", str(bundle.parent / "machine"))
    assert main(["models", "import", str(bundle), "--shared"]) == 0
    (bundle / "reports" / "card.md").write_text("damaged")
    monkeypatch.chdir(bundle.parent)
    bundle.rename("tiny")
    assert main(["models", "import", "tiny", "--shared", "--replace"]) == 80
    assert "card.md has sha256" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["show", "verify", "rm"])
def test_an_unknown_bundle_is_code_80(verb: str, bundle: Path, capsys: Captured) -> None:
    assert main(["models", verb, "no-such-bundle"]) == 80
    assert "no-such-bundle" in capsys.readouterr().err


def test_the_embedded_bundle_cannot_be_removed(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "rm", "nano"]) == 80
    assert "embedded" in capsys.readouterr().err


def test_the_embedded_bundle_holds(capsys: Captured) -> None:
    assert main(["models", "verify", "nano"]) == 0
    assert capsys.readouterr().out.startswith("nano: ")


# --- show -------------------------------------------------------------------------------------------------------------

ACCURACY = {
    "date": "2026-11-22",
    "machine": "x86_64 Linux",
    "reference": {"bundle": "whole", "sha256": "0" * 64},
    "slices": {"calibration": 20, "held_out": 10, "modalities": {"CT": 30}, "digest": "0" * 64},
    "graphs": [
        {
            "graph": "decoder", "precision": "int8", "output": name, "cosine": cosine, "relative_error": 0.01,
            "passed": cosine > 0.999,
        }
        for name, cosine in (("logits", 0.9995), ("hidden", 0.998))
    ],
    "answers": {"prompts": 12, "same_text": 0.97, "box_iou": 0.95, "mask_dice": None},
    "gates": {"cosine": 0.999},
}  # fmt: skip


def with_files(bundle: Path, more: dict[str, bytes]) -> str:
    """Return the folder of a bundle like `bundle` with more files."""
    manifest = open_bundle(bundle).manifest
    old = {name: (bundle / name).read_bytes() for name in manifest.files}
    folder = bundle.with_name("more")
    write_bundle(
        folder,
        name="more",
        family="native",
        graphs=manifest.graphs,
        files={**old, **more},
        precision=manifest.precision,
        calibration_digest="c" * 64,
    )
    return str(folder)


def test_reports_are_summed_up_and_printed_as_they_are(bundle: Path, capsys: Captured) -> None:
    content = json.dumps(ACCURACY).encode()
    folder = with_files(bundle, {"reports/accuracy.json": content})
    assert main(["models", "show", folder]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "accuracy.json, 2026-11-22, against bundle whole, 10 held-out slices, calibrated on 20" in lines
    assert "decoder int8 hidden 1.0e-02 0.998000 missed" in lines
    assert "answers box_iou 0.95" in lines
    assert main(["models", "show", folder, "--report", "accuracy.json"]) == 0
    assert capsys.readouterr().out.encode() == content


def test_a_report_of_another_form_does_not_stop_the_rest(bundle: Path, capsys: Captured) -> None:
    hostile = {"reports/accuracy.json": b"[" * 100_000, "reports/parity.json": b'{"date": 1, "fp32": [{"graph": 2}]}'}
    assert main(["models", "show", with_files(bundle, hostile)]) == 0
    out = capsys.readouterr().out
    assert "accuracy.json: of another form" in out
    assert "parity.json: of another form" in out
    assert out.endswith("# 小模型\n")


def test_a_report_that_is_not_there_is_code_80_and_the_others_are_named(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "show", str(bundle), "--report", "../bundle.json"]) == 80
    assert "it has: card.md" in capsys.readouterr().err


def test_kernels_are_told_by_target(bundle: Path, capsys: Captured) -> None:
    files = {"kernels/sm_90/kernels.json": b"{}", "kernels/sm_89/kernels.json": b"{}"}
    assert main(["models", "show", with_files(bundle, files)]) == 0
    assert "kernels for sm_89, sm_90" in " ".join(capsys.readouterr().out.split())


def test_the_memory_of_the_embedded_bundle_is_told(capsys: Captured) -> None:
    assert main(["models", "show", "nano"]) == 0
    out = capsys.readouterr().out
    assert "MiB for 1024 tokens, on a CPU" in out
    assert "parity.json, 20" in out


def test_a_graph_that_is_none_is_told_in_place_of_its_memory(bundle: Path, capsys: Captured) -> None:
    (bundle / "graphs/vision_encoder.onnx").write_bytes(b"no graph")
    assert main(["models", "show", str(bundle)]) == 0
    assert "vision_encoder.onnx: it is no ONNX file" in capsys.readouterr().out


# --- import -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_anything_is_copied(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 17})())
    assert main(["models", "import", str(bundle)]) == 40
    assert "0.0 MB free" in capsys.readouterr().err
    assert not (bundle.parent / "home" / "bundles").exists()
