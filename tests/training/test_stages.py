"""A whole run in a few samples and steps: killed, resumed, and its checkpoint loads."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from edgemed.errors import CannotRead, InvalidInput
from edgemed.families import native_torch
from edgemed.families.native_text import NativeText
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.mask_decoder import MaskDecoder
from edgemed.models.projector import Projector
from edgemed.models.tiny_vit import TinyViT
from edgemed.training import language_stage, loop, run, stages
from edgemed.training.slices import LabelledSlice
from edgemed.training.stages import draw_curves, name_structures

RECIPE = """
name = "tiny"
folder = "run"
seed = 3
[data]
packages = "packages"
[data.plan]
ct = 7
cells = 2
nowhere = 4
[structures]
steps = 2
batch = 1
[language]
steps = 3
batch = 1
turns = 2
[masks]
steps = 1
prompts = 1
"""


@pytest.fixture
def recipe(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pieces: dict[str, list[LabelledSlice]],
    stub_encoder: type[nn.Module],
    tiny_native: ModuleType,
) -> Path:
    """A recipe whose pictures are phantoms, whose encoder is a stub and whose language model is tiny."""
    monkeypatch.setattr(stages, "read_sources", lambda packages, records: pieces)
    monkeypatch.setattr(stages, "_read_lite_medsam", lambda packages: {})
    monkeypatch.setattr(stages.tiny_vit, "from_lite_medsam", lambda state: TinyViT())
    monkeypatch.setattr(TinyViT, "forward", stub_encoder.forward)
    monkeypatch.setattr(stages.mask_decoder, "from_lite_medsam", lambda state, width: MaskDecoder(width))
    monkeypatch.setattr(stages.train_tokenizer, "build", lambda seed: tiny_native.tokenizer_json())
    small = dict(width=32, layers=4, heads=2, kv_heads=1, head_dim=16, inner=48, draft_rank=8)
    monkeypatch.setattr(stages, "LlamaConfig", functools.partial(LlamaConfig, **small))
    monkeypatch.setattr(loop, "SAVE_EVERY", 1)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_in_a_checkpoint(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recipe.parent / "run"
    real, calls = language_stage.language_loss, []

    def killed(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(language_stage, "language_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert torch.load(folder / "language.pt", weights_only=True)["step"] == 1
    assert not (folder / "checkpoint").exists()
    structure = (folder / "structure.pt").read_bytes()

    checkpoint = run(recipe)
    assert checkpoint == folder / "checkpoint"
    assert len(calls) == 4  # the step that was cut short, and the third
    assert (folder / "structure.pt").read_bytes() == structure
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert log.count("structure 2/2") == 1
    assert log.count("no pictures for nowhere: left out") == 1
    assert log.count("features 9/9") == 1
    assert f"checkpoint written to {checkpoint}" in capsys.readouterr().out

    model = native_torch.load(checkpoint)
    saved = torch.load(folder / "masks.pt", weights_only=True)["decoder"]
    assert all(torch.equal(v, model.mask_decoder.state_dict()[k]) for k, v in saved.items())
    table = model.decoder.embedding.weight[model.decoder.config.first_coordinate :][: model.decoder.config.bins]
    assert torch.equal(model.projector.coordinates, table)
    scale = model.projector.presence_scale
    assert len(set(scale.tolist())) == 1
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["training"]["sources"] == ["phantom", "photo"]
    assert (config["training"]["recipe"], config["training"]["samples"]) == ("tiny", 9)
    assert NativeText(checkpoint / "tokenizer.json").vocabulary == model.decoder.config.vocabulary
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    other = checkpoint / "config.json"
    other.write_text(other.read_text().replace('"width": 32', '"width": 48'))
    with pytest.raises(InvalidInput, match="weight .* is .*, expected"):
        native_torch.load(checkpoint)
    other.write_text(other.read_text().replace('"family": "native"', '"family": "else"'))
    with pytest.raises(InvalidInput, match="family 'else'"):
        native_torch.load(checkpoint)
    other.write_text("{")
    with pytest.raises(InvalidInput, match="not JSON"):
        native_torch.load(checkpoint)
    with pytest.raises(CannotRead, match=r"config\.json"):
        native_torch.load(folder)


def test_missing_weights_say_how_to_get_them(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(CannotRead, match=r"fetch_packages\.py"):
        run(path, packages=tmp_path / "elsewhere")


def test_curves_show_the_last_try_of_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[int], list[float], str]] = []
    import matplotlib.axes

    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, x, y, label: drawn.append((list(x), list(y), label)) or []
    )
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda self, **how: None)
    log = tmp_path / "train.log"
    lines = [(50, 3.0), (100, 2.0), (150, 1.5), (50, 2.5), (100, 1.0)]
    log.write_text("".join(f"07:00:00 masks {s}/200, 0.10 s a step, 1 min left: dice {v:.3f}, look-up 0.5\n"
                           for s, v in lines) + "07:00:01 scenes 250/300\n")  # fmt: skip
    draw_curves(log, tmp_path / "curves.png")
    assert drawn == [([50, 100], [2.5, 1.0], "dice"), ([50, 100], [0.5, 0.5], "look-up")]


def test_structures_start_from_their_names(text: NativeText, make_projector: Callable[[], Projector]) -> None:
    torch.manual_seed(0)
    first = text.tokens().first_coordinate
    model = Llama(LlamaConfig(vocabulary=text.vocabulary, first_coordinate=first, width=32, layers=1, heads=2,
                              kv_heads=1, head_dim=16, inner=32, draft_rank=8))  # fmt: skip
    projector = make_projector()
    name_structures(projector, model, text)
    assert torch.equal(projector.owner, projector.structure)
    ids = [*text.encode_answer("liver")[:-1], *text.encode_answer("肝脏")[:-1]]
    expected = model.embedding.weight[ids].sum(0) / len(ids) ** 0.5
    assert torch.allclose(projector.owner[0], expected, atol=1e-6)
