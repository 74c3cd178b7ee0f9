"""Every stored array of the tiny MedPLIB: runtime code with the exported graphs on onnxruntime, and in torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from edgemed.backends import Outputs
from edgemed.core import Answer, Prompt, PromptRegion
from edgemed.families import Family, Prepared, Reading, medplib_view
from edgemed.families.medplib_text import IMAGE_ID, REGION_ID
from edgemed.families.medplib_view import MASK_THRESHOLD, MedplibView, Placed, postprocess, region_mask, to_mask
from edgemed.graphs import Feeds
from edgemed.infer import InferOptions, Session

Array = npt.NDArray[Any]

ATOL = 5e-4
"""What the README of the reference suggests."""

ATOL_ROUNDED = 2e-3
"""On mask logits in the compact copy, whose weights are rounded to 2**-18; see test_medplib_torch."""

NEAR = 1e-3
"""A pixel whose logit is this near to the threshold may be on either side, says the README; ATOL_ROUNDED if rounded."""

HERE = Path(__file__).resolve().parent
with np.load(HERE.parent / "reference" / "medplib-tiny" / "expected.npz") as stored:
    STORED = tuple(stored)

ELSEWHERE = {
    r"clip_embed_ln_.*": ("models/test_clip_vit.py", "inside vision_encoder, before its first block"),
    r"sam_patch_embed_.*": ("models/test_sam_med2d.py", "inside vision_encoder"),
    r"sam_block_outputs_.*": ("models/test_sam_med2d.py", "inside vision_encoder"),
    r"dense_.*": ("models/test_sam_med2d.py", "inside mask_decoder: constants of the prompt encoder"),
    r"sam_mask_dense": ("models/test_sam_med2d.py", "inside mask_decoder"),
    r"sam_\w+_sparse": ("models/test_sam_med2d.py", "inside mask_decoder"),
    r"train_labels_.*": ("families/test_medplib_text.py", "training targets"),
}
"""Pattern of names -> where they are compared, and why that is not here."""

HERE_TOO = [name for name in STORED if not any(re.fullmatch(pattern, name) for pattern in ELSEWHERE)]
LIKELIEST = [name for name in STORED if name.startswith("argmax_")]
BINARY = [name for name in STORED if "mask_binary_" in name]
LIMIT = InferOptions(max_new_tokens=24, grammar=False)
UI = {
    "ui_point": PromptRegion("point", point=(150.5, 70.5)),
    "ui_point_corner": PromptRegion("point", point=(235.0, 3.0)),
    "ui_box": PromptRegion("box", box=(20.0, 60.0, 121.0, 151.0)),
}
"""What the published page was pointed at, on the 4:3 picture; prompts.json has it as row, column."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A mask with what it was drawn from: the state of its `<SEG>`, mask_decoder's outputs, logits in scan pixels."""

    hidden: Array
    out: Feeds
    logits: Array
    mask: Array


class Recorder:
    """A family that passes everything on and keeps what the mask decoder was fed with and gave last."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.fed: Sequence[Feeds] = ()
        self.masks: Sequence[Feeds] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def mask_feeds(self, *given: Any) -> tuple[Feeds, ...]:
        fed = self.fed = self._family.mask_feeds(*given)
        return fed

    def read_answer(self, *given: Any) -> Reading:
        self.masks = given[-1]
        return self._family.read_answer(*given)


class Compared:
    """What the bundle gives in place of the stored arrays; what several of them need is computed once."""

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny
        self.session: Session = tiny.open_session()
        self.recorder = Recorder(self.session.family)
        self.session.family = cast("Family", self.recorder)
        stored: dict[str, Any] = tiny.bundle.manifest.settings["view"]
        view: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        self.view = MedplibView(**view)
        self.vocabulary: int = tiny.bundle.spec("decoder").outputs[0].shape[-1]
        self.end = int(tiny.arrays.prompts["ids"]["</s>"])
        self.seg = int(tiny.arrays.prompts["ids"]["<SEG>"])
        self.vision = cache(self._vision)
        self.asked = cache(self._asked)
        self.prompt = cache(self._prompt)
        self.decoded = cache(self._decoded)
        self.drawn = cache(self._drawn)
        self.native = cache(self._native)
        self.ways: dict[str, Callable[..., Array]] = {
            r"pixel_(clip|sam)_(\w+)": lambda kind, image: self.prepared(image).vision[f"{kind}_image"],
            r"clip_features_(\w+)": lambda image: self.vision(image)["image_features"],
            r"clip_last_hidden_(\w+)": self.last_features,
            r"sam_image_embedding_(\w+)": lambda image: self.vision(image)["mask_features"],
            r"image_tokens_every_16th_(\w+)": lambda image: self.projected(image)["image_tokens"][None, ::16],
            r"image_tokens_(\w+)": lambda image: self.projected(image)["image_tokens"][None],
            r"region_feature_map_every_16th_(\w+)": self.adapted,
            r"region_mask336_(\w+)": lambda region: self.view.region_square(self.region(region)),
            r"region_mask24_(\w+)": lambda region: self.view.region_map(self.region(region)),
            r"region_embedding_(\w+)": lambda region: self.projected(*self.place(region))["region_tokens"],
            r"gate_probs_(\w+)": self.router,
            r"gate_expert_(\w+)": lambda case: self.router(case).argmax(-1),
            r"logits_firstlast8_(\w+)": self.first_and_last_logits,
            r"logits_last8_(\w+)_without_mask": self.logits_without_mask,
            r"argmax_(\w+)": lambda case: self.prompt_part(case, "logits").argmax(-1),
            r"llm_layer_last_hidden_(\w+)": self.last_of_each_layer,
            r"llm_final_hidden_last64_(\w+)": lambda case: self.prompt_part(case, "hidden")[:, -64:],
            r"gen_margin_(\w+)": self.margins,
            r"gen_(\w+)": lambda case: np.array([self.written(case)], np.int32),
            r"seg_hidden_(\w+)": lambda case: self.drawn(case).hidden,
            r"seg_vector_(\w+)": lambda case: self.seg_vector(self.drawn(case).hidden),
            r"low_res_mask_(\w+)": lambda case: self.drawn(case).out["mask_logits"][:, :1],
            r"iou_pred_(\w+)": lambda case: self.drawn(case).out["iou"][:, :1],
            r"mask_logits_(\w+)": lambda case: self.drawn(case).logits[None],
            r"mask_binary_(\w+)": lambda case: self.drawn(case).mask[None],
            r"post_(\d+)x(\d+)_to_(\d+)x(\d+)": self.post,
            r"sam_(\w+)_low_res_all4": lambda kinds: self.native(kinds)["mask_logits"],
            r"sam_(\w+)_iou_all4": lambda kinds: self.native(kinds)["iou"],
        }

    def __call__(self, name: str) -> Array:
        """Return ours for a stored array, NaN where no graph gives a value.

        `release_cli_*` is asked for as the other arrays of its kind, of a case `release_*`.
        """
        if name.startswith("release_cli_"):
            name = re.sub("^release_cli_(.*)(ground_)", r"\1release_\2", name)
        for pattern, way in self.ways.items():
            if match := re.fullmatch(pattern, name):
                return way(*match.groups())
        raise KeyError(name)

    # -- pictures and regions --

    def place(self, region: str) -> tuple[str, PromptRegion]:
        """Return the picture that a stored region lies on, and the region as a user gives it."""
        if region in UI:
            return "four_three", UI[region]
        return region, PromptRegion("mask", mask=self.tiny.arrays.input(f"region_mask_{region}").astype(bool))

    def region(self, region: str) -> Array:
        image, given = self.place(region)
        return region_mask(given, *self.tiny.arrays.input(f"image_{image}").shape[:2])

    def prepared(self, image: str, *regions: PromptRegion) -> Prepared:
        prepared: Prepared = self.tiny.session.family.prepare((self.tiny.scan(image),), Prompt("x", regions))
        return prepared

    def _vision(self, image: str) -> Outputs:
        outputs: Outputs = self.tiny.run("vision_encoder", self.prepared(image).vision)
        return outputs

    def last_features(self, image: str) -> Array:
        """The class token takes part inside and is not given out."""
        return np.pad(self.vision(image)["last_features"], ((0, 0), (1, 0), (0, 0)), constant_values=np.nan)

    def projected(self, image: str, *regions: PromptRegion) -> Outputs:
        return self.pooled(image, self.prepared(image, *regions).projector["region_weights"])

    def pooled(self, image: str, weights: Array) -> Outputs:
        features = self.vision(image)["image_features"]
        outputs: Outputs = self.tiny.run("projector", {"image_features": features, "region_weights": weights})
        return outputs

    def adapted(self, image: str) -> Array:
        """A region of one patch is that patch's adapted feature; at most 16 of them go in at a time."""
        patches = np.eye(self.view.grid**2, dtype=np.float32)[::16]
        return np.concatenate([self.pooled(image, part)["region_tokens"] for part in np.split(patches, 3)])[None]

    # -- text --

    def _asked(self, case: str) -> tuple[Answer, Sequence[Feeds], Sequence[Feeds]]:
        prompt = self.tiny.arrays.prompts[case]
        question = prompt["prompt"].split("<im_end>\n")[1].split(" ASSISTANT:")[0]
        regions = (self.place(prompt["image"])[1],) if prompt["region"] else ()
        settings = {"compat": "release-cli"} if case.endswith("_v1") else {}
        scan = self.tiny.scan(prompt["image"])
        answer = self.session.ask(scan, Prompt(question, regions, settings=settings), LIMIT)
        return answer, self.recorder.fed, self.recorder.masks

    def written(self, case: str) -> list[int]:
        """What a Session wrote, with the end token where the model ended; the end came unless all 24 are there."""
        ids = list(self.asked(case)[0].generated_ids)
        return ids if len(ids) == 24 else [*ids, self.end]

    def _prompt(self, case: str) -> tuple[list[int], Array]:
        """Return the stored ids with the placeholders replaced by row ids, and the rows."""
        prompt = self.tiny.arrays.prompts[case]
        image = prompt["image"]
        regions = (self.place(image)[1],) if prompt["region"] else ()
        projected = self.projected(image, *regions)
        first, patches = self.vocabulary, len(projected["image_tokens"])
        ids: list[int] = []
        for i in self.tiny.arrays.input(f"input_ids_{case}")[0].tolist():
            if i == IMAGE_ID:
                ids += range(first, first + patches)
            else:
                ids.append(first + patches if i == REGION_ID else i)
        return ids, np.concatenate([projected["image_tokens"], projected["region_tokens"][: len(regions)]])

    def run_decoder(self, ids: Sequence[int], rows: Array) -> Outputs:
        start = {"past_length": np.zeros(1, np.int64), "logits_from": np.zeros(1, np.int64)}
        feeds = {"input_ids": np.array([ids], np.int64), "image_tokens": rows, **start}
        outputs: Outputs = self.tiny.run("decoder", feeds)
        return outputs

    def _decoded(self, case: str) -> Outputs:
        """Outputs at every position of the prompt and of the stored answer but its last token."""
        ids, rows = self.prompt(case)
        return self.run_decoder([*ids, *self.tiny.arrays.expected(f"gen_{case}")[0, :-1].tolist()], rows)

    def answer_part(self, case: str, output: str) -> Array:
        """Return an output where each token of the stored answer is predicted, [steps, ...]."""
        return self.decoded(case)[output][0, -self.tiny.arrays.expected(f"gen_{case}").size :]

    def prompt_part(self, case: str, output: str) -> Array:
        return self.decoded(case)[output][:, : len(self.prompt(case)[0])]

    def router(self, case: str) -> Array:
        """Router probabilities, [layers, tokens, experts]."""
        return np.asarray(self.prompt_part(case, "router")[0].transpose(1, 0, 2))

    def first_and_last_logits(self, case: str) -> Array:
        logits = self.prompt_part(case, "logits")
        return np.concatenate([logits[:, :8], logits[:, -8:]], axis=1)

    def logits_without_mask(self, case: str) -> Array:
        """The authors' code leaves out the place of a region that comes without a mask; ours takes its tags away."""
        ids, rows = self.prompt(case)
        region = self.vocabulary + len(rows) - 1
        return self.run_decoder([i for i in ids if i != region], rows)["logits"][:, -8:]

    def last_of_each_layer(self, case: str) -> Array:
        """Only what comes after the last norm is given out."""
        last = self.prompt_part(case, "hidden")[0, -1]
        return np.stack([*[np.full_like(last, np.nan)] * 3, last])

    def margins(self, case: str) -> Array:
        best = np.sort(self.answer_part(case, "logits"), axis=-1)
        return np.asarray(best[:, -1] - best[:, -2])

    # -- masks --

    def _drawn(self, case: str) -> Drawn:
        """What a Session drew; training's rule on the first release's prompt, which no mode has, by graphs alone."""
        name = case.removeprefix("release_")
        image = self.tiny.arrays.prompts[name]["image"]
        rows, columns = self.tiny.arrays.input(f"image_{image}").shape[:2]
        if case.endswith("_v1") and case == name:
            step = self.tiny.arrays.expected(f"gen_{case}")[0].tolist().index(self.seg)
            hidden = self.answer_part(case, "hidden")[step : step + 1]
            out: Feeds = self.run_masks(image, seg_hidden=hidden, has_seg=np.ones(1, np.float32))
            logits = postprocess(out["mask_logits"][0, 0], rows, columns)
            return Drawn(hidden, out, logits, to_mask(logits))
        answer, (fed,), (out,) = self.asked(name)
        logits = postprocess(out["mask_logits"][0, 0], rows, columns)
        (region,) = answer.regions
        assert region.mask is not None
        return Drawn(fed["seg_hidden"], out, logits, region.mask)

    def seg_vector(self, hidden: Array) -> Array:
        """Return what mask_decoder makes of a state first, by the checkpoint's weights: it does not come out."""
        weights = load_file(self.tiny.arrays / "model.safetensors")
        first, second = (f"model.text_hidden_fcs.0.{i}" for i in (0, 2))
        inner = np.maximum(hidden @ weights[f"{first}.weight"].T + weights[f"{first}.bias"], 0)
        return np.asarray(inner @ weights[f"{second}.weight"].T + weights[f"{second}.bias"])

    def run_masks(self, image: str, **given: Array) -> Outputs:
        """Return the outputs of mask_decoder for one prompt; what is not given is absent."""
        feeds: dict[str, Array] = {"mask_features": self.vision(image)["mask_features"]}
        for tensor in self.tiny.bundle.spec("mask_decoder").inputs[1:]:
            feeds[tensor.name] = np.zeros([d if isinstance(d, int) else 1 for d in tensor.shape], tensor.dtype)
        feeds["point_labels"] -= 1
        outputs: Outputs = self.tiny.run("mask_decoder", {**feeds, **given})
        return outputs

    def post(self, rows: str, columns: str, out_rows: str, out_columns: str) -> Array:
        low = self.tiny.arrays.expected("low_res_mask_ground_square_demo")[0, 0]
        resized = Placed(int(rows), int(columns), 0, 0)
        return medplib_view._postprocess(low, resized, int(out_rows), int(out_columns), 256, "reference")[None, None]

    def _native(self, kinds: str) -> Outputs:
        stored = {kind: self.tiny.arrays.input(f"sam_{kind}") for kind in ("points", "point_labels", "box")}
        flag, given = np.ones(1, np.float32), kinds.split("_")
        feeds: dict[str, Array] = {}
        if "points" in given:
            feeds |= {"points": stored["points"], "point_labels": stored["point_labels"].astype(np.int64)}
        if "box" in given:
            feeds |= {"boxes": stored["box"], "has_box": flag}
        if "mask" in given:
            feeds |= {"mask_prompts": self.tiny.arrays.input("sam_mask_input")[0], "has_mask": flag}
        return self.run_masks("square", **feeds)


@pytest.fixture(scope="module", params=["medplib", "medplib_in_torch"])
def compared(reference: Any, request: pytest.FixtureRequest) -> Iterator[Compared]:
    made = Compared(request.getfixturevalue(request.param))
    yield made
    made.session.close()


@pytest.mark.parametrize("name", [name for name in HERE_TOO if name not in (*LIKELIEST, *BINARY)])
def test_array_is_the_authors(compared: Compared, name: str) -> None:
    rounded = bool(compared.tiny.arrays.steps) and ("low_res" in name or "mask_logits" in name)
    atol = ATOL_ROUNDED if rounded else ATOL * (2 if name.startswith("gen_margin") else 1)
    compared.tiny.compare(name, compared(name), atol)


@pytest.mark.parametrize("name", LIKELIEST)
def test_likeliest_token_at_every_position_is_the_authors(compared: Compared, name: str) -> None:
    expected = compared.tiny.arrays.expected(name)
    assert compared(name).shape == expected.shape
    logits = compared.prompt_part(name.removeprefix("argmax_"), "logits")
    short_of_best = logits.max(-1) - np.take_along_axis(logits, expected[..., None].astype(np.int64), -1)[..., 0]
    # Rounded weights turn near ties around; see test_medplib_torch.
    assert short_of_best.max() <= (ATOL if compared.tiny.arrays.steps else 0)


@pytest.mark.parametrize("name", BINARY)
def test_mask_of_a_session_is_the_authors(compared: Compared, name: str) -> None:
    logits = compared(name.replace("mask_binary_", "mask_logits_"))
    near = ATOL_ROUNDED if compared.tiny.arrays.steps else NEAR
    certain = np.abs(logits - math.log(MASK_THRESHOLD / (1 - MASK_THRESHOLD))) >= near
    assert certain.mean() > 0.99
    np.testing.assert_array_equal(compared(name)[certain], compared.tiny.arrays.expected(name)[certain].astype(bool))


@pytest.mark.parametrize("case", [name.removeprefix("gen_margin_") for name in STORED if "gen_margin" in name])
def test_prompt_of_a_session_has_the_authors_ids(compared: Compared, case: str) -> None:
    assert list(compared.asked(case)[0].prompt_ids) == compared.prompt(case)[0]


def test_first_release_takes_another_state_only_where_there_is_one_seg(compared: Compared) -> None:
    cases = [f"ground_{image}_v1" for image in ("square", "four_three", "two_one")]
    by_release = [compared.drawn(f"release_{case}").hidden for case in cases]
    by_training = [compared.drawn(case).hidden for case in cases]
    gaps = [np.abs(a - b).max() for a, b in zip(by_release, by_training, strict=True)]
    assert [gap < ATOL for gap in gaps] == [False, True, True]


def test_every_stored_array_is_compared_here_or_where_the_table_says(compared: Compared) -> None:
    assert compared.tiny.arrays.names == STORED
    for pattern, (file, _) in ELSEWHERE.items():
        assert any(re.fullmatch(pattern, name) for name in STORED), pattern
        part = max(re.split(r"\.\*|\\w\+", pattern), key=len)
        assert part in (HERE.parent / file).read_text(encoding="utf-8"), f"{file} does not compare {part}"
