"""A native bundle that answers what the test wants: hand-made ONNX graphs of a few nodes in the real shapes.

vision_encoder averages 4 x 4 pixels. The projector gives constant tokens and proposes, for each structure that the
answer names, the box the answer gives it. The decoder writes one fixed answer, whatever it is asked, keeping its place
in it in the state. The mask decoder outlines the box it is given; without a box, the point's 24 px square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgemed.bundle import Bundle, write_bundle
from edgemed.families.native_lexicon import STRUCTURES, structure_of
from edgemed.families.native_text import SPECIAL_TOKENS, NativeText, Place, parse
from edgemed.geometry import bins_to_box
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

WIDTH, CHANNELS, TOKENS, CACHE = 8, 3, 6, 1024
STRUCTURE_COUNT = len(STRUCTURES)

DIMS = {
    "regions": DimRange(1, 1, 4),
    "rows": DimRange(1, TOKENS, TOKENS + 4),
    "sequence": DimRange(1, 64, CACHE),
    "kept": DimRange(1, 1, CACHE),
    "cache": DimRange(CACHE, CACHE, CACHE),
    "prompts": DimRange(1, 1, 2),
    "points": DimRange(1, 1, 4),
}


def tokenizer_json() -> str:
    """Return a tokenizer of the special tokens and the 256 bytes, no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


VOCABULARY = len(SPECIAL_TOKENS) + 256


def spec(role: str, inputs: list[TensorSpec], outputs: list[TensorSpec], *state: tuple[str, str]) -> GraphSpec:
    used = {d for t in (*inputs, *outputs) for d in t.shape if isinstance(d, str)}
    return GraphSpec(role, tuple(inputs), tuple(outputs), {d: DIMS[d] for d in sorted(used)}, state)


def specs() -> dict[str, GraphSpec]:
    f, t = "float32", TensorSpec
    features = t("image_features", f, (1, CHANNELS, 64, 64))
    return {
        "vision_encoder": spec("vision_encoder", [t("image", f, (1, 3, 256, 256))], [features]),
        "projector": spec(
            "projector",
            [features, t("region_maps", f, ("regions", 64, 64))],
            [
                t("image_tokens", f, (TOKENS, WIDTH)),
                t("region_tokens", f, ("regions", WIDTH)),
                t("presence", f, (STRUCTURE_COUNT,)),
                t("boxes", f, (STRUCTURE_COUNT, 4)),
                t("structure_maps", f, (STRUCTURE_COUNT, 64, 64)),
            ],
        ),
        "decoder": spec(
            "decoder",
            [
                t("input_ids", "int64", (1, "sequence")),
                t("image_tokens", f, ("rows", WIDTH)),
                t("past_length", "int64", (1,)),
                t("logits_from", "int64", (1,)),
                t("past_key_0", f, (1, 1, "cache", 1)),
            ],
            [
                t("logits", f, (1, "kept", VOCABULARY)),
                t("hidden", f, (1, "kept", WIDTH)),
                t("box_draft", "int64", (1, "kept", 4)),
                t("present_key_0", f, (1, 1, "cache", 1)),
            ],
            ("present_key_0", "past_key_0"),
        ),
        "mask_decoder": spec(
            "mask_decoder",
            [
                features,
                t("boxes", f, ("prompts", 4)),
                t("has_box", f, ("prompts",)),
                t("points", f, ("prompts", "points", 2)),
                t("point_labels", "int64", ("prompts", "points")),
                t("mask_prompts", f, ("prompts", 256, 256)),
                t("has_mask", f, ("prompts",)),
                t("seg_hidden", f, ("prompts", WIDTH)),
                t("has_seg", f, ("prompts",)),
            ],
            [t("mask_logits", f, ("prompts", 256, 256)), t("iou", f, ("prompts",))],
        ),
    }


def graph(of: GraphSpec, nodes: list[tuple[str, str, str, dict[str, Any]]], constants: dict[str, Any]) -> bytes:
    """Return an ONNX file; a node is (operator, "in in", "out out", attributes)."""
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def infos(tensors: tuple[TensorSpec, ...]) -> list[Any]:
        return [helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.shape)) for t in tensors]

    made = helper.make_graph(
        [helper.make_node(op, i.split(), o.split(), **attributes) for op, i, o, attributes in nodes],
        of.role,
        infos(of.inputs),
        infos(of.outputs),
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def proposals(answer: str) -> np.ndarray:
    """Return float32 [structures, 4], model pixels: the box the answer gives to each structure, else zeros."""
    boxes = np.zeros((STRUCTURE_COUNT, 4), np.float32)
    for place in parse(answer):
        if isinstance(place, Place) and place.bins is not None and (index := structure_of(place.name)) is not None:
            boxes[index] = bins_to_box(place.bins, 256)
    return boxes


def graphs(answer: str, answer_ids: list[int]) -> dict[str, bytes]:
    s = specs()
    f = np.float32
    centres = np.arange(256, dtype=f) + f(0.5)
    return {
        "vision_encoder": graph(
            s["vision_encoder"],
            [("AveragePool", "image", "image_features", {"kernel_shape": [4, 4], "strides": [4, 4]})],
            {},
        ),
        "projector": graph(
            s["projector"],
            [
                ("Identity", "tokens", "image_tokens", {}),
                ("Reshape", "region_maps flat", "cells", {}),
                ("MatMul", "cells weights", "region_tokens", {}),
                ("Identity", "p", "presence", {}),
                ("Identity", "b", "boxes", {}),
                ("Identity", "m", "structure_maps", {}),
            ],
            {
                "tokens": np.ones((TOKENS, WIDTH), f),
                "flat": np.array([-1, 4096], np.int64),
                "weights": np.ones((4096, WIDTH), f),
                "p": np.full(STRUCTURE_COUNT, 0.81, f),
                "b": proposals(answer),
                "m": np.zeros((STRUCTURE_COUNT, 64, 64), f),
            },
        ),
        # The state holds the prompt's length, which a call without a past tells: a prefill wants the logits after it.
        "decoder": graph(
            s["decoder"],
            [
                ("Shape", "input_ids", "length", {"start": 1, "end": 2}),
                ("Equal", "past_length zero", "is_first", {}),
                ("Add", "logits_from one", "after_first", {}),
                ("ReduceMax", "past_key_0", "stored", {"keepdims": 0}),
                ("Cast", "stored", "stored_scalar", {"to": TensorProto.INT64}),
                ("Where", "is_first after_first stored_scalar", "prompt", {}),
                ("Cast", "prompt", "prompt_f", {"to": TensorProto.FLOAT}),
                ("Mul", "past_key_0 zero_f", "blank", {}),
                ("Add", "blank prompt_f", "present_key_0", {}),
                ("Add", "past_length after_first", "tokens_there", {}),
                ("Sub", "tokens_there prompt", "begin", {}),
                ("Sub", "length logits_from", "kept", {}),
                ("Squeeze", "kept", "kept_scalar", {}),
                ("Squeeze", "zero", "zero_scalar", {}),
                ("Squeeze", "one", "one_scalar", {}),
                ("Range", "zero_scalar kept_scalar one_scalar", "counted", {}),
                ("Add", "counted begin", "place", {}),
                ("Min", "place last_word", "at", {}),
                ("Gather", "script at", "words", {}),
                ("Unsqueeze", "words first_axis", "ids", {}),
                ("OneHot", "ids depth off_on", "logits", {}),
                ("Cast", "place", "place_f", {"to": TensorProto.FLOAT}),
                ("Unsqueeze", "place_f outer_axes", "place_3d", {}),
                ("Mul", "place_3d ones", "hidden", {}),
                ("Concat", "one kept four", "draft_shape", {"axis": 0}),
                ("Expand", "draft draft_shape", "box_draft", {}),
            ],
            {
                "one": np.array([1], np.int64),
                "zero": np.array([0], np.int64),
                "zero_f": np.array(0, f),
                "four": np.array([4], np.int64),
                "script": np.array(answer_ids, np.int64),
                "last_word": np.array(len(answer_ids) - 1, np.int64),
                "first_axis": np.array([0], np.int64),
                "outer_axes": np.array([0, 2], np.int64),
                "depth": np.array(VOCABULARY, np.int64),
                "off_on": np.array([0, 12], f),
                "ones": np.ones((1, 1, WIDTH), f),
                "draft": np.zeros((1, 1, 4), np.int64),
            },
        ),
        "mask_decoder": graph(
            s["mask_decoder"],
            [
                ("ReduceMean", "points", "point", {"axes": [1], "keepdims": 0}),
                ("Concat", "point point", "corners", {"axis": 1}),
                ("Add", "corners reach", "around", {}),
                ("Unsqueeze", "has_box axis_1", "has_box_column", {}),
                ("Greater", "has_box_column half", "boxed", {}),
                ("Where", "boxed boxes around", "box", {}),
                ("Split", "box", "x0 y0 x1 y1", {"axis": 1}),
                ("Sub", "centres x0", "from_left", {}),
                ("Sub", "x1 centres", "to_right", {}),
                ("Sub", "centres y0", "from_top", {}),
                ("Sub", "y1 centres", "to_bottom", {}),
                ("Min", "from_left to_right", "across", {}),
                ("Min", "from_top to_bottom", "down", {}),
                ("Unsqueeze", "across axis_1", "across_3d", {}),
                ("Unsqueeze", "down axis_2", "down_3d", {}),
                ("Min", "across_3d down_3d", "mask_logits", {}),
                ("Mul", "has_box zero", "nothing", {}),
                ("Add", "nothing nine", "iou", {}),
            ],
            {
                "reach": np.array([-12, -12, 12, 12], f),
                "half": np.array(0.5, f),
                "axis_1": np.array([1], np.int64),
                "axis_2": np.array([2], np.int64),
                "centres": centres[None],
                "zero": np.array(0, f),
                "nine": np.array(0.9, f),
            },
        ),
    }


def checkpoint(folder: Path) -> Path:
    """Return `folder` with a native checkpoint: real shapes but for a small language model, weights random.

    Its answers depend on the question; tags are likelier than other tokens, so that they hold places and masks.
    """
    import torch

    from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES
    from edgemed.families.native_torch import build, save_checkpoint
    from edgemed.models.llama import LlamaConfig
    from edgemed.models.structure_head import StructureConfig

    file = folder.with_suffix(".tokenizer.json")
    file.write_text(tokenizer_json(), encoding="utf-8")
    text = NativeText(file)
    decoder = LlamaConfig(
        vocabulary=text.vocabulary, first_coordinate=text.tokens().first_coordinate, width=64, layers=2, heads=4,
        kv_heads=2, head_dim=16, inner=96, draft_rank=8,
    )  # fmt: skip
    projector = StructureConfig(STRUCTURE_COUNT, len(MODALITIES), len(BODY_PARTS), context=24, layers=1, heads=2)
    torch.manual_seed(3)
    model = build({"decoder": vars(decoder), "projector": vars(projector)})
    with torch.no_grad():
        model.mask_decoder.frequencies.normal_()
        model.projector.coordinates.normal_()
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.1)
        for name, weight in model.decoder.named_parameters():
            if weight.ndim == 2 and not name.startswith("box_draft"):
                weight.normal_(0, 0.25)
        table = model.decoder.embedding.weight
        table[:, 0] = 1  # a channel that is the same for all tokens biases the logits, the two tables being one
        ids = text.tokens()
        table[[ids.ref, ids.ref_end, ids.seg], 0] = torch.tensor([4.0, 6.0, 8.0])
    save_checkpoint(folder, model, file, {"recipe": "tiny", "sources": ["bccd"], "seed": 1, "samples": 2})
    return folder


def make(folder: Path, answer: str, settings: dict[str, Any] | None = None) -> Bundle:
    """Return a bundle that answers `answer` (tagged text) to everything."""
    file = folder.with_suffix(".tokenizer.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tokenizer_json(), encoding="utf-8")
    ids = NativeText(file).encode_answer(answer)
    files: dict[str, bytes | Path] = {f"graphs/{role}.onnx": data for role, data in graphs(answer, ids).items()}
    files["tokenizer/tokenizer.json"] = file
    files["NOTICE"] = b"made by a test\n"
    files["reports/parity.json"] = json.dumps({}).encode()
    return write_bundle(
        folder,
        name="tiny",
        family="native",
        graphs=specs(),
        files=files,
        precision=dict.fromkeys(specs(), "fp32"),
        settings=settings or {},
    )
