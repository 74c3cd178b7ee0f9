"""Every stored array of the tiny MedPLIB against the exported bundle: runtime code and graphs on onnxruntime, CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.core import Answer, Prompt, PromptRegion, Scan
from edgemed.families import Family, Prepared, Reading, Written
from edgemed.families.medplib_text import IMAGE_ID, REGION_ID
from edgemed.families.medplib_view import MASK_THRESHOLD, MedplibView, postprocess
from edgemed.graphs import Feeds
from edgemed.infer import InferOptions

Array = npt.NDArray[Any]

ATOL = 5e-4
"""What the README of the reference suggests."""

ATOL_ROUNDED = 2e-3
"""On mask logits in the compact copy, whose weights are rounded to 2**-18; see test_medplib_torch."""

NEAR = 1e-3
"""A pixel whose logit is this near to the threshold may be on either side, says the README."""

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
PROMPTS = [name.removeprefix("gen_margin_") for name in STORED if name.startswith("gen_margin_")]
SPREAD = 16
"""Of the larger feature maps every 16th patch is stored."""


@dataclass(frozen=True)
class Asked:
    """An answer of a Session with what its family saw on the way."""

    answer: Answer
    written: Written
    seg_hidden: Array
    masks: Sequence[Feeds]


class Recorder:
    """A family that passes everything on and keeps what the mask decoder was fed and gave."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def mask_feeds(self, prompt: Prompt, prepared: Prepared, projected: Feeds, written: Written) -> tuple[Feeds, ...]:
        self.fed = self._family.mask_feeds(prompt, prepared, projected, written)
        return self.fed

    def read_answer(
        self, scans: Sequence[Scan], prompt: Prompt, prepared: Prepared, projected: Feeds, written: Written,
        masks: Sequence[Feeds],
    ) -> Reading:  # fmt: skip
        self.written, self.masks = written, masks
        return self._family.read_answer(scans, prompt, prepared, projected, written, masks)


class Compared:
    """What the bundle gives in place of the stored arrays; what several of them need is computed once."""

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny
        view = tiny.bundle.manifest.settings["view"]
        self.view = MedplibView(**{k: tuple(v) if isinstance(v, list) else v for k, v in view.items()})
        self.vocabulary: int = tiny.bundle.spec("decoder").outputs[0].shape[-1]
        self.end = int(tiny.arrays.prompts["ids"]["</s>"])
        self.seg = int(tiny.arrays.prompts["ids"]["<SEG>"])
        self.vision = cache(self._vision)
        self.asked = cache(self._asked)
        self.decoded = cache(self._decoded)
        self.sam = cache(self._sam)
        image = r"(square|four_three|two_one)"
        self.ways: dict[str, Callable[..., Array]] = {
            rf"pixel_(clip|sam)_{image}": lambda kind, image: self.prepared(image).vision[f"{kind}_image"],
            rf"clip_features_{image}": lambda image: self.vision(image)["image_features"],
            r"clip_last_hidden_(\w+)": self.last_features,
            rf"sam_image_embedding_{image}": lambda image: self.vision(image)["mask_features"],
            r"image_tokens_square": lambda: self.projected("square")["image_tokens"][None],
            r"image_tokens_every_16th_(\w+)": lambda i: self.projected(i)["image_tokens"][None, ::SPREAD],
            r"region_feature_map_every_16th_(\w+)": self.adapted,
            r"region_mask336_(\w+)": lambda region: self.view.region_square(self.mask(region)),
            r"region_mask24_(\w+)": lambda region: self.view.region_map(self.mask(region)),
            r"region_embedding_(\w+)": self.region_token,
            r"gate_probs_(\w+)": lambda case: self.prompt_part(case, "router")[0].transpose(1, 0, 2),
            r"gate_expert_(\w+)": lambda case: self.prompt_part(case, "router")[0].argmax(-1).T,
            r"logits_firstlast8_(\w+)": self.logits,
            r"logits_last8_(\w+)_without_mask": self.without_mask,
            r"argmax_(\w+)": lambda case: self.prompt_part(case, "logits").argmax(-1),
            r"llm_layer_last_hidden_(\w+)": self.last_layer,
            r"llm_final_hidden_last64_(\w+)": lambda case: self.prompt_part(case, "hidden")[:, -64:],
            r"gen_margin_(\w+)": self.margins,
            r"gen_(\w+)": self.written,
            r"(?:()|(release)_cli_)seg_hidden_(\w+)": lambda _, release, case: self.asked(case, release).seg_hidden,
            r"(release_cli_)?seg_vector_(\w+)": lambda cli, case: self.projected_seg(self.asked(case, cli).seg_hidden),
            r"(release_cli_)?low_res_mask_(\w+)": lambda cli, case: self.first_mask(case, cli)[None, None],
            r"(release_cli_)?iou_pred_(\w+)": lambda cli, case: self.asked(case, cli).masks[0]["iou"][:, :1],
            r"(release_cli_)?mask_logits_(\w+)": lambda cli, case: self.mask_logits(case, cli)[None],
            r"(release_cli_)?mask_binary_(\w+)": lambda cli, case: self.asked(case, cli).answer.regions[0].mask[None],
            r"post_(\d+)x(\d+)_to_(\d+)x(\d+)": self.post,
            r"sam_(\w+)_low_res_all4": lambda kinds: self.sam(kinds)["mask_logits"],
            r"sam_(\w+)_iou_all4": lambda kinds: self.sam(kinds)["iou"],
        }
