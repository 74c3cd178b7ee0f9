"""MedPLIB asked with examples, and with the parts a checkpoint may have for them; their weights are random.

No weights with these parts were published, so that nothing here is compared with what the authors' code computed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemed.backends import Outputs, open_runner
from edgemed.checkpoints import open_checkpoint
from edgemed.core import Example, Prompt, PromptRegion, Scan
from edgemed.errors import InvalidInput
from edgemed.export.graph_writer import GraphWriter
from edgemed.export.traced_graph import build_traced_graph
from edgemed.families import Family, Prepared, Written
from edgemed.families.medplib_text import IMAGE_ID, MedplibText
from edgemed.families.medplib_torch import describe
from edgemed.families.medplib_view import mask_picture, overlaid
from edgemed.families.opened_torch import open_folder
from edgemed.families.published_tokens import TOKENIZER, PublishedTokens
from edgemed.graphs import Feeds
from edgemed.infer import InferOptions, Session
from edgemed.models.in_context import MaskTokenEncoder, TokenCompressor

Array = npt.NDArray[Any]

ONE = InferOptions(max_new_tokens=1)
PATCHES, COMPRESSED, OF_MASK = 576, 256, 64
SEPARATE = {"icl": "separate"}


class Recorder:
    """A family that passes everything on, keeps what the decoder started from, and answers each question `<SEG>`."""

    def __init__(self, family: Family, seg: int, width: int) -> None:
        self._family = family
        self._answer = Written((seg,), (), {-1: np.linspace(-1, 1, width, dtype=np.float32)})
        self.rows = np.zeros((0, width), np.float32)
        self.ids: Sequence[int] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def ask(self, *given: Any, **more: Any) -> Any:
        question = self._family.ask(*given, **more)
        self.rows, self.ids = question.fixed["image_tokens"], question.prompt_ids
        return question

    def mask_feeds(self, prompt: Prompt, prepared: Prepared, projected: Feeds, written: Written) -> Any:
        return self._family.mask_feeds(prompt, prepared, projected, self._answer)


class Model:
    """A checkpoint folder run by torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bundle, artifact = open_folder(folder)
        self.session = Session(bundle, "torch", "cpu", threads=1, artifact=artifact)
        self.family = self.session.family
        self.text = MedplibText(PublishedTokens.open(bundle.file(TOKENIZER)))
        self.vocabulary = self.text.tokens.vocabulary
        published = describe(open_checkpoint(folder))
        self.modules = {role: published.load(role) for role in ("vision_encoder", "projector")}
        self.width = published.decoder.width

    def asked(self, prompt: Prompt, scan: Scan) -> tuple[Recorder, Any]:
        """Return what the decoder started from, and the answer."""
        recorder = Recorder(self.family, self.text.seg_id, self.width)
        self.session.family = cast("Family", recorder)
        try:
            return recorder, self.session.ask(scan, prompt, ONE)
        finally:
            self.session.family = self.family

    @torch.no_grad()
    def rows_of(self, picture: Array, mask: Array | None = None) -> Array:
        """Return the rows of a picture, or of an encoded mask that goes with it, without the family's own code."""
        view = self.family._view  # type: ignore[attr-defined]
        sam = torch.zeros(1, 3, view.sam_side, view.sam_side)
        features = self.modules["vision_encoder"](torch.from_numpy(view.clip_image(picture)), sam)[0]
        square = torch.zeros(1, 1, 336, 336) if mask is None else torch.from_numpy(view.mask_image(mask))
        out = self.modules["projector"](features, torch.zeros(1, PATCHES), square)
        return np.asarray(out[0 if mask is None else 2])

    def ids(self, prompt: Prompt, before: str, sizes: Sequence[int]) -> list[int]:
        """Return the ids of a prompt whose images have so many rows, counted on."""
        out: list[int] = []
        row, left = self.vocabulary, list(sizes)
        for index in self.text.encode_prompt(prompt.text, before=before):
            count = left.pop(0) if index == IMAGE_ID else 0
            out += range(row, row + count) if index == IMAGE_ID else [index]
            row += count
        assert not left
        return out


@pytest.fixture(scope="module")
def plain(reference: Any) -> Iterator[Model]:
    """The tiny MedPLIB as published: it has neither part."""
    model = Model(reference("medplib-tiny").folder)
    yield model
    model.session.close()


@pytest.fixture(scope="module")
def parts(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The tiny MedPLIB with a token compressor and a mask encoder of random weights."""
    folder = tmp_path_factory.mktemp("icl") / "checkpoint"
    add_parts(reference("medplib-tiny").folder, folder)
    model = Model(folder)
    yield model
    model.session.close()


def add_parts(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.npz", "bin", "sharded", "*.png"))
    config = json.loads((source / "config.json").read_text())
    config |= {"mm_token_compress": True, "icl_mask_encoder": True}
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(13)
    width = config["hidden_size"]
    tensors = load_file(source / "model.safetensors")
    for key, module in (("mm_token_compressor", TokenCompressor(width)), ("mask_encoder", MaskTokenEncoder(width))):
        tensors |= {f"model.{key}.{name}": torch.randn_like(w) * 0.2 for name, w in module.state_dict().items()}
    save_file(tensors, target / "model.safetensors")


def scan(seed: int, rows: int = 90, columns: int = 120) -> Scan:
    return Scan(np.random.default_rng(seed).integers(0, 256, (1, rows, columns, 3), np.uint8), "OT")


def example(seed: int, rows: int = 90, columns: int = 120) -> Example:
    mask = np.zeros((rows, columns), bool)
    mask[20 : 30 + seed, 30:70] = True
    return Example(scan(seed, rows, columns), mask)


QUERY = scan(0)
TWO = (example(1), example(2, 150, 75))

# --- what is shown, in which order ------------------------------------------------------------------------------------


def test_overlay_shows_each_image_with_its_mask_drawn_in_and_then_the_query(plain: Model) -> None:
    prompt = Prompt("Segment the same.", examples=TWO)
    asked, answer = plain.asked(prompt, QUERY)
    shown = [overlaid(e.scan.shown(0), e.mask) for e in TWO]
    expected = np.concatenate([plain.rows_of(picture) for picture in (*shown, QUERY.shown(0))])
    np.testing.assert_allclose(asked.rows, expected, atol=1e-5)
    overlay = "The blue overlay is the reference segmentation mask.\n"
    image = "<im_start><image><im_end>\n"
    before = f"Example 1: {image}{overlay}Example 2: {image}{overlay}Query: "
    assert list(answer.prompt_ids) == plain.ids(prompt, before, [PATCHES] * 3)


def test_separate_masks_are_pictures_of_their_own_without_a_mask_encoder(plain: Model) -> None:
    prompt = Prompt("Segment the same.", settings=SEPARATE, examples=TWO)
    asked, answer = plain.asked(prompt, QUERY)
    shown = [picture for e in TWO for picture in (e.scan.shown(0), mask_picture(e.mask))]
    expected = np.concatenate([plain.rows_of(picture) for picture in (*shown, QUERY.shown(0))])
    np.testing.assert_allclose(asked.rows, expected, atol=1e-5)
    image = "<im_start><image><im_end>\n"
    before = "".join(f"Example {i} image: {image}Example {i} mask: {image}" for i in (1, 2)) + "Query: "
    assert list(answer.prompt_ids) == plain.ids(prompt, before, [PATCHES] * 5)


def test_separate_masks_go_through_the_mask_encoder_where_there_is_one(parts: Model) -> None:
    prompt = Prompt("Segment the same.", settings=SEPARATE, examples=TWO)
    asked, answer = parts.asked(prompt, QUERY)
    expected = [rows for e in TWO for rows in (parts.rows_of(e.scan.shown(0)), parts.rows_of(e.scan.shown(0), e.mask))]
    assert [len(rows) for rows in expected] == [COMPRESSED, OF_MASK] * 2
    expected.append(parts.rows_of(QUERY.shown(0)))
    np.testing.assert_allclose(asked.rows, np.concatenate(expected), atol=1e-5)
    image = "<im_start><image><im_end>\n"
    before = "".join(f"Example {i} image: {image}Example {i} mask: {image}" for i in (1, 2)) + "Query: "
    assert list(answer.prompt_ids) == parts.ids(prompt, before, [COMPRESSED, OF_MASK] * 2 + [COMPRESSED])


def test_overlay_does_not_use_the_mask_encoder(parts: Model) -> None:
    prompt = Prompt("Segment the same.", examples=TWO)
    asked, _ = parts.asked(prompt, QUERY)
    shown = [overlaid(e.scan.shown(0), e.mask) for e in TWO]
    expected = np.concatenate([parts.rows_of(picture) for picture in (*shown, QUERY.shown(0))])
    np.testing.assert_allclose(asked.rows, expected, atol=1e-5)


def test_a_question_without_examples_has_the_compressed_rows_of_its_image_and_its_regions(parts: Model) -> None:
    region = PromptRegion("box", box=(10, 10, 60, 60))
    asked, answer = parts.asked(Prompt("What is <region>?", (region,)), QUERY)
    assert len(asked.rows) == COMPRESSED + 1
    assert max(answer.prompt_ids) == parts.vocabulary + COMPRESSED
    np.testing.assert_allclose(asked.rows[:COMPRESSED], parts.rows_of(QUERY.shown(0)), atol=1e-5)


@pytest.mark.parametrize("compat", ["reference", "release-cli"])
def test_examples_leave_the_template_around_them_as_it_is(plain: Model, compat: str) -> None:
    settings = {"compat": compat}
    bare = plain.asked(Prompt("Outline it.", settings=settings), QUERY)[0].ids
    with_one = plain.asked(Prompt("Outline it.", settings=settings, examples=TWO[:1]), QUERY)[0].ids
    start = plain.text.tokens.id_of("<im_start>")
    assert (bare.count(start), with_one.count(start)) == (1, 2)
    question = len(bare) - bare.index(plain.vocabulary + PATCHES - 1) - 1  # what follows the image's rows
    assert with_one[-question:] == bare[-question:]
    assert with_one[: bare.index(start) // 2] == bare[: bare.index(start) // 2]


# --- masks, and what is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("icl", ["overlay", "separate"])
def test_only_the_query_image_goes_to_the_mask_decoder(parts: Model, icl: str) -> None:
    alone = parts.asked(Prompt("Outline it."), QUERY)[1]
    after = parts.asked(Prompt("Outline it.", settings={"icl": icl}, examples=TWO), QUERY)[1]
    np.testing.assert_array_equal(after.regions[0].mask, alone.regions[0].mask)
    assert after.regions[0].mask.shape == (QUERY.rows, QUERY.columns)
    prepared = parts.family.prepare((QUERY,), Prompt("x", settings={"icl": icl}, examples=TWO))
    assert not any(p.vision["sam_image"].any() for p in prepared.examples)


def test_examples_are_encoded_once_for_several_queries(plain: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = plain.session._runners["vision_encoder"].result()
    pictures: list[Array] = []
    real = runner.run

    def run(feeds: Feeds) -> Outputs:
        pictures.append(feeds["clip_image"])
        return real(feeds)

    monkeypatch.setattr(runner, "run", run)
    three = (example(3), example(4), example(5))
    for seed in (10, 11):
        plain.asked(Prompt("Outline it.", examples=three), scan(seed))
    assert len(pictures) == 4 + 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("x", examples=(example(1),) * 4), "the prompt has 4 examples; 1 to 3 were expected"),
        (Prompt("x", (PromptRegion("point", point=(9, 9)),), examples=TWO), "examples and regions"),
        (
            Prompt("x", settings={"icl": "side by side"}, examples=TWO),
            "icl is 'side by side'; one of overlay, separate",
        ),
        (Prompt("x", settings={"icl": "none"}), "icl is 'none'"),
        (
            Prompt("x", settings=SEPARATE, examples=(*TWO, example(3))),
            r"has 4\d\d\d tokens with its 3 examples \(separate\); at most 4095 fit\. Give fewer examples, or use icl",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(plain: Model, prompt: Prompt, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plain.family.prepare((QUERY,), prompt)


def test_examples_without_an_image_to_ask_about_are_refused(plain: Model) -> None:
    with pytest.raises(InvalidInput, match="without an image to ask about"):
        plain.family.prepare((), Prompt("x", examples=TWO))


def test_three_examples_fit_where_tokens_are_compressed(parts: Model) -> None:
    prompt = Prompt("x", settings=SEPARATE, examples=(*TWO, example(3)))
    assert len(parts.asked(prompt, QUERY)[0].rows) == 3 * (COMPRESSED + OF_MASK) + COMPRESSED


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_graphs_follow_the_parts(parts: Model, plain: Model) -> None:
    def sizes(model: Model) -> dict[str, Any]:
        spec = model.family.graphs()["projector"]
        return {t.name: t.shape for t in (*spec.inputs, *spec.outputs)}

    assert sizes(plain) == {
        "image_features": (1, 576, 64), "region_weights": ("regions", 576), "image_tokens": (576, 96),
        "region_tokens": ("regions", 96),
    }  # fmt: skip
    assert sizes(parts) == sizes(plain) | {
        "mask_image": (1, 1, 336, 336), "image_tokens": (256, 96), "mask_tokens": (64, 96),
    }  # fmt: skip
    assert plain.family.graphs()["decoder"].dims["rows"].max == 7 * PATCHES
    assert parts.family.graphs()["decoder"].dims["rows"].max == 7 * COMPRESSED


@torch.no_grad()
def test_the_projectors_graph_gives_what_its_module_gives(parts: Model, tmp_path: Path) -> None:
    published = describe(open_checkpoint(parts.folder))
    spec = published.specs["projector"]
    rng = np.random.default_rng(17)
    feeds: dict[str, Array] = {
        "image_features": rng.standard_normal((1, PATCHES, 64), np.float32),
        "region_weights": rng.random((2, PATCHES), np.float32) / PATCHES,
        "mask_image": (rng.random((1, 1, 336, 336)) > 0.6).astype(np.float32),
    }
    expected = parts.modules["projector"](*(torch.from_numpy(feeds[t.name]) for t in spec.inputs))
    graph = build_traced_graph(published.modules["projector"], published.tensors["projector"], spec, GraphWriter())
    (tmp_path / "projector.onnx").write_bytes(graph.SerializeToString())
    runner = open_runner("onnxruntime", tmp_path / "projector.onnx", spec, device="cpu", threads=1)
    try:
        found = runner.run(feeds)
    finally:
        runner.close()
    for tensor, values in zip(spec.outputs, expected, strict=True):
        np.testing.assert_allclose(found[tensor.name], values.numpy(), atol=2e-4)
