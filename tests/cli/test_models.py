"""`edgemed models`: list, show, verify, import, remove, against a small bundle made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemed.bundle import write_bundle
from edgemed.cli import main
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
        files={"graphs/vision_encoder.onnx": b"no graph", "reports/card.md": "# 小模型\n".encode()},
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
        "embedded": False,
        "problem": None,
    }
    assert main(["models", "show", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "licence of weights" in shown
    assert shown.endswith("# 小模型\n")
    assert main(["models", "rm", "tiny"]) == 0
    assert main(["models", "list"]) == 0
    assert "tiny" not in capsys.readouterr().out.replace("removed tiny", "")


def test_verify_tells_which_file_was_changed(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "verify", str(bundle)]) == 0
    (bundle / "reports" / "card.md").write_text("other")
    assert main(["models", "verify", str(bundle)]) == 80
    assert "reports/card.md" in capsys.readouterr().err


def test_a_damaged_bundle_is_listed_with_its_problem(bundle: Path, capsys: Captured) -> None:
    assert main(["models", "import", str(bundle), "--name", "damaged"]) == 0
    (bundle.parent / "home" / "bundles" / "damaged" / "bundle.json").write_text("{")
    assert main(["models", "list"]) == 0
    assert "not JSON" in capsys.readouterr().out


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
