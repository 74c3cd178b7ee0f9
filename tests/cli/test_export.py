"""`edgemed export` of published checkpoints: a bundle that answers, or one line and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemed.bundle import open_bundle
from edgemed.cli import main

Captured = pytest.CaptureFixture[str]
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(reference: Any, tmp_path: Path) -> Path:
    """A copy of the tiny MedRegA checkpoint that a test may break."""
    folder = tmp_path / "Checkpoint A"
    left_out = shutil.ignore_patterns("*.npz", "*.png", "sharded")
    shutil.copytree(reference("medrega-tiny").folder, folder, ignore=left_out)
    return folder


def in_shards(folder: Path) -> tuple[Path, Path]:
    """Spread the weights over two shards with an index; return the shards."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for part, half in zip(parts, halves, strict=True):
        save_file({name: tensors[name] for name in half}, part)
    weight_map = {name: part.name for part, half in zip(parts, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    return parts[0], parts[1]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch hostile-code-ran",))


def other_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl", "architectures": ["Qwen2VL"]}))


def missing_shard(folder: Path) -> None:
    in_shards(folder)[1].unlink()


def truncated_shard(folder: Path) -> None:
    shard = in_shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def key_too_many(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"language_model.surplus.weight": torch.zeros(2)}))


def key_missing(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("mlp1.3.bias"))


def wrong_shape(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"mlp1.3.bias": torch.zeros(5)}))


def not_finite(folder: Path) -> None:
    change(folder, lambda tensors: tensors["mlp1.3.weight"].view(-1)[7:8].fill_(float("nan")))


def pickle_with_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"mlp1.3.bias": Hostile()}, folder / "pytorch_model.bin")


BROKEN = {
    "another family": (other_family, "model_type is 'qwen2_vl'"),
    "a missing shard": (missing_shard, "model-00002-of-00002.safetensors"),
    "a truncated shard": (truncated_shard, "model-00002-of-00002.safetensors"),
    "a key too many": (key_too_many, "language_model.surplus.weight"),
    "a missing key": (key_missing, "mlp1.3.bias"),
    "a wrong shape": (wrong_shape, "mlp1.3.bias is [5], expected [96]"),
    "a weight that is no number": (not_finite, "not a finite number"),
    "a pickle with code in it": (pickle_with_code, "pytorch_model.bin"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_does_not_hold_ends_in_one_line_and_leaves_nothing(
    case: str, checkpoint: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    breaking, told = BROKEN[case]
    breaking(checkpoint)
    code = main(["export", str(checkpoint), "-o", str(tmp_path / "out"), "--no-compare"])
    out, err = capsys.readouterr()
    assert code in (20, 22)
    assert out == ""
    (line,) = err.splitlines()
    assert told in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Checkpoint A"]


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(tmp_path / "no"), "-o", str(tmp_path / "out")]) == 20
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out")]) == 20
    assert capsys.readouterr().err.count("\n") == 2


def test_the_bundle_answers_and_says_that_its_graphs_agree_with_torch(
    checkpoint: Path, reference: Any, tmp_path: Path, capsys: Captured
) -> None:
    image = str(reference("medrega-tiny") / "image_square.png")
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "out"), "-q"]) == 0
    parity = json.loads(open_bundle(tmp_path / "out").file("reports/parity.json").read_text())
    assert parity["compared"] is True
    assert max(row["relative_error"] for row in parity["rows"]) < 1e-4
    assert parity["answers"]["same_ids"] == parity["answers"]["questions"] > 0
    asked = ["infer", image, "--prompt", "Which organ is shown?", "--max-new-tokens", "4", "--json", "-q"]
    capsys.readouterr()
    assert main([*asked, "--bundle", str(tmp_path / "out")]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert main([*asked, "--bundle", str(checkpoint), "--backend", "torch"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == ours["text"]
    assert ours["provenance"]["bundle"] == "checkpoint-a"


def test_a_folder_that_is_taken_is_left_as_it_is(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "out"), "--no-compare"]) == 40
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_bundle_for_tensorrt_answers_in_onnxruntime_too(
    checkpoint: Path, reference: Any, tmp_path: Path, capsys: Captured
) -> None:
    image = str(reference("medrega-tiny") / "image_square.png")
    made = ["export", str(checkpoint), "-o", str(tmp_path / "out"), "--target", "tensorrt", "--no-compare", "-q"]
    assert main(made) == 0
    assert set(open_bundle(tmp_path / "out").manifest.precision.values()) == {"fp16"}
    capsys.readouterr()
    asked = ["infer", image, "--prompt", "Which organ is shown?", "--max-new-tokens", "4", "--json", "-q"]
    assert main([*asked, "--bundle", str(tmp_path / "out"), "--backend", "onnxruntime"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["precision"]["decoder"] == "fp16"


def test_a_precision_that_the_target_has_not_is_one_line(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    asked = ["export", str(checkpoint), "-o", str(tmp_path / "out"), "--target", "tensorrt", "--vision", "bf16"]
    assert main(asked) == 22
    (line,) = capsys.readouterr().err.splitlines()
    assert "--vision is bf16" in line
    assert not (tmp_path / "out").exists()
