"""Every stored array of the tiny MedRegA: runtime code with the exported graphs on onnxruntime, and in torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.core import Answer, Prompt, Turn
from edgemed.families.medrega_view import MedRegaView
from edgemed.infer import InferOptions

Array = npt.NDArray[Any]

ATOL = 1e-4
"""What the README of the reference suggests."""

HERE = Path(__file__).resolve().parent
with np.load(HERE.parent / "reference" / "medrega-tiny" / "expected.npz") as stored:
    STORED = tuple(stored)

ELSEWHERE = {
    r"vit_embeddings_.*": ("models/test_intern_vit.py", "inside vision_encoder, before its first block"),
    r"vit_out_interp_.*": ("models/test_intern_vit.py", "another side than the exported graph's"),
    r"pixel_shuffle_.*": ("families/test_medrega_torch.py", "inside projector"),
    r"image_tokens_psv2_.*": ("families/test_medrega_torch.py", "another checkpoint: its config has ps_version v2"),
    r"train_labels": ("families/test_medrega_text.py", "training targets"),
    r"train_loss_reweight": ("", "how training weighs its targets; the family is not trained here"),
}
"""Pattern of names -> where they are compared ("": nowhere), and why that is not here."""

HERE_TOO = [name for name in STORED if not any(re.fullmatch(pattern, name) for pattern in ELSEWHERE)]

PICTURES = {"text_only_en": (), "tiles_t2r_en": ("tiles_two_one",), "history_en": ("square",)}
"""Prompt -> its pictures as the arrays name them, where prompts.json does not say."""
WHOLE = ("vqa_en", "r2t_zh", "t2r_en", "t2r_zh")
"""The prompts whose logits are stored at every position; of the others, the first and last 8."""


class Compared:
    """What the bundle gives in place of the stored arrays; what several of them need is computed once."""

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny
        settings = tiny.bundle.manifest.settings
        self.view = MedRegaView(**settings["view"])
        self.vocabulary: int = tiny.bundle.spec("decoder").outputs[0].shape[-1]
        self.image_token = int(tiny.arrays.prompts["ids"]["<IMG_CONTEXT>"])
        self.end = int(tiny.arrays.prompts["ids"]["<|im_end|>"])
        self.answer = cache(self._answer)
        self.features = cache(self._features)
        self.decoded = cache(self._decoded)
        self.ways: dict[str, Callable[..., Array]] = {
            r"pixel_(square|four_three|two_one|tiles_two_one)": self.pixels,
            r"pixel_pad2square_(\w+)": lambda image: self._seen(image, replace(self.view, pad_to_square=True)),
            r"pixel_interp_(\w+)": lambda image: self._seen(image, replace(self.view, side=168)),
            r"vit_out_(\w+)": self.with_class_token,
            r"vit_hidden_states_(\w+)": self.vision_layers,
            r"image_tokens_(\w+)": self.image_tokens,
            r"gen_margin_(\w+)": self.margins,
            r"gen_beam5_(\w+)": lambda case: np.array([self.written(case, 5)], np.int32),
            r"gen_(\w+)": lambda case: np.array([self.written(case)], np.int32),
            r"logits_(\w+)": self.logits,
            r"argmax_(\w+)": lambda case: self.prompt_part(case, "logits").argmax(-1),
            r"llm_hidden_states_(\w+)": self.decoder_layers,
            r"train_loss": self.train_loss,
        }

    def __call__(self, name: str) -> Array:
        """Return ours for a stored array, NaN where no graph gives a value."""
        found = [(way, match) for way in self.ways if (match := re.fullmatch(way, name))]
        way, match = found[0]
        return self.ways[way](*match.groups())

    # -- pictures --

    def pixels(self, image: str) -> Array:
        tiles = {"tiles": "2"} if image.startswith("tiles_") else {}
        scan = self.tiny.scan(image.removeprefix("tiles_"))
        image_fed: Array = self.tiny.session.family.prepare((scan,), Prompt("x", settings=tiles)).vision["image"]
        return image_fed

    def _seen(self, image: str, view: MedRegaView) -> Array:
        return view.model_image(self.tiny.arrays.input(f"image_{image}"))

    def _features(self, image: str) -> Array:
        features: Array = self.tiny.run("vision_encoder", {"image": self.pixels(image)})["image_features"]
        return features

    def with_class_token(self, image: str) -> Array:
        """The class token takes part inside and is not given out."""
        return np.pad(self.features(image), ((0, 0), (1, 0), (0, 0)), constant_values=np.nan)

    def vision_layers(self, image: str) -> Array:
        out = self.with_class_token(image)
        return np.stack([*[np.full_like(out, np.nan)] * 4, out])

    def image_tokens(self, image: str) -> Array:
        features = self.features(image)
        rows: Array = self.tiny.run("projector", {"image_features": features})["image_tokens"]
        return rows.reshape(len(features), -1, rows.shape[-1])

    # -- text --

    def pictures(self, case: str) -> tuple[str, ...]:
        prompt = self.tiny.arrays.prompts[case]
        return PICTURES[case] if case in PICTURES else tuple(prompt.get("images") or [prompt["image"]])

    def _answer(self, case: str, beams: int = 1) -> Answer:
        asked = self.tiny.arrays.prompts
        settings = {"task": "none", **({"tiles": "2"} if case.startswith("tiles") else {})}
        first = asked["vqa_en"]
        history = (Turn(first["question"], first["response"], first["raw_response"]),) if "history" in case else ()
        prompt = Prompt(asked[case]["question"], settings=settings, history=history)
        scans = [self.tiny.scan(picture.removeprefix("tiles_")) for picture in self.pictures(case)]
        answer: Answer = self.tiny.session.ask(
            scans, prompt, InferOptions(max_new_tokens=24, beams=beams, grammar=False)
        )
        return answer

    def written(self, case: str, beams: int = 1) -> list[int]:
        """What a Session wrote, with the end token where the model ended; the end came unless all 24 are there."""
        ids = list(self.answer(case, beams).generated_ids)
        return ids if len(ids) == 24 else [*ids, self.end]

    def _run(self, ids: Array, pictures: tuple[str, ...]) -> dict[str, Array]:
        """Outputs of the decoder at every position of ids [tokens], image placeholders replaced by rows."""
        width = self.tiny.bundle.spec("decoder").inputs[1].shape[-1]
        rows = [self.image_tokens(picture).reshape(-1, width) for picture in pictures]
        ids = ids.astype(np.int64)
        places = ids == self.image_token
        assert places.sum() == sum(map(len, rows))
        ids[places] = self.vocabulary + np.arange(places.sum())
        outputs: dict[str, Array] = self.tiny.run(
            "decoder",
            {
                "input_ids": ids[None],
                "image_tokens": np.concatenate(rows or [np.zeros((1, width), np.float32)]),
                "past_length": np.zeros(1, np.int64),
                "logits_from": np.zeros(1, np.int64),
            },
        )
        return outputs

    def _decoded(self, case: str) -> dict[str, Array]:
        prompt = self.tiny.arrays.input(f"input_ids_{case}")[0]
        return self._run(
            np.concatenate([prompt, self.tiny.arrays.expected(f"gen_{case}")[0, :-1]]), self.pictures(case)
        )

    def prompt_part(self, case: str, output: str) -> Array:
        return self.decoded(case)[output][:, : self.tiny.arrays.input(f"input_ids_{case}").shape[1]]

    def logits(self, case: str) -> Array:
        logits = self.prompt_part(case, "logits")
        return logits if case in WHOLE else np.concatenate([logits[:, :8], logits[:, -8:]], axis=1)

    def decoder_layers(self, case: str) -> Array:
        """Only what comes after the last norm is given out."""
        hidden = self.prompt_part(case, "hidden")
        return np.stack([*[np.full_like(hidden, np.nan)] * 3, hidden])

    def margins(self, case: str) -> Array:
        """How far the best token is ahead at each step; the first may not be the end."""
        steps = self.tiny.arrays.expected(f"gen_{case}").shape[1]
        logits = self.decoded(case)["logits"][0, -steps:].copy()
        logits[0, self.end] = -np.inf
        best = np.sort(logits, axis=-1)
        return np.asarray(best[:, -1] - best[:, -2])

    def train_loss(self) -> Array:
        logits = self._run(self.tiny.arrays.input("train_input_ids")[0], ("two_one",))["logits"][0, :-1]
        labels = self.tiny.arrays.expected("train_labels")[0, 1:]
        kept = labels != -100
        peak = logits.max(-1)
        rest = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
        return np.asarray((rest[kept] - logits[kept, labels[kept]]).mean()[None])


@pytest.fixture(scope="module", params=["medrega", "medrega_in_torch"])
def compared(reference: Any, request: pytest.FixtureRequest) -> Compared:
    return Compared(request.getfixturevalue(request.param))


@pytest.mark.parametrize("name", HERE_TOO)
def test_array_is_the_authors(compared: Compared, name: str) -> None:
    compared.tiny.compare(name, compared(name), ATOL * (2 if name.startswith("gen_margin") else 1))


@pytest.mark.parametrize("case", [name.removeprefix("gen_margin_") for name in STORED if "gen_margin" in name])
def test_prompt_of_a_session_has_the_authors_ids(compared: Compared, case: str) -> None:
    ids = np.array([compared.answer(case).prompt_ids])
    rows = ids[ids >= compared.vocabulary]
    assert rows.tolist() == list(range(compared.vocabulary, compared.vocabulary + rows.size))
    ids[ids >= compared.vocabulary] = compared.image_token
    np.testing.assert_array_equal(ids, compared.tiny.arrays.input(f"input_ids_{case}"))


def test_every_stored_array_is_compared_here_or_where_the_table_says(compared: Compared) -> None:
    assert compared.tiny.arrays.names == STORED
    for pattern, (file, _) in ELSEWHERE.items():
        assert any(re.fullmatch(pattern, name) for name in STORED), pattern
        if file:
            part = pattern.removesuffix(".*")
            assert part in (HERE.parent / file).read_text(encoding="utf-8"), f"{file} does not compare {part}"
