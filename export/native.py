"""The native family's four graphs: torch modules -> ONNX, with the GraphSpec of each.

Vision encoder, projector and mask decoder are exported by torch; the decoder is written node by node
(`decoder_graph`). The specs are written here once and go into the manifest.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping, Sequence

import onnx
import torch
from torch import Tensor, nn

from edgemed.export.decoder_graph import build_decoder_graph, decoder_spec
from edgemed.families.native_torch import NativeModel
from edgemed.graphs import DimRange, GraphSpec, TensorSpec
from edgemed.models.projector import ROWS
from edgemed.models.tiny_vit import CHANNELS, GRID, SIDE

MAX_REGIONS = 16
MAX_PROMPTS = 24
MAX_POINTS = 16
CACHE = 1024


def native_specs(model: NativeModel) -> dict[str, GraphSpec]:
    """Return the GraphSpecs of the four graphs, by role."""
    width = model.decoder.config.width
    structures = model.projector.head.config.structures
    f, t = "float32", TensorSpec
    features = t("image_features", f, (1, CHANNELS, GRID, GRID))
    return {
        "vision_encoder": GraphSpec("vision_encoder", (t("image", f, (1, 3, SIDE, SIDE)),), (features,)),
        "projector": GraphSpec(
            "projector",
            (features, t("region_maps", f, ("regions", GRID, GRID))),
            (
                t("image_tokens", f, (ROWS, width)),
                t("region_tokens", f, ("regions", width)),
                t("presence", f, (structures,)),
                t("boxes", f, (structures, 4)),
                t("structure_maps", f, (structures, GRID, GRID)),
            ),
            {"regions": DimRange(1, 1, MAX_REGIONS)},
        ),
        "decoder": decoder_spec(model.decoder.config, image_rows=DimRange(1, ROWS, ROWS + MAX_REGIONS), cache=CACHE),
        "mask_decoder": GraphSpec(
            "mask_decoder",
            (
                features,
                t("boxes", f, ("prompts", 4)),
                t("has_box", f, ("prompts",)),
                t("points", f, ("prompts", "points", 2)),
                t("point_labels", "int64", ("prompts", "points")),
                t("mask_prompts", f, ("prompts", SIDE, SIDE)),
                t("has_mask", f, ("prompts",)),
                t("seg_hidden", f, ("prompts", width)),
                t("has_seg", f, ("prompts",)),
            ),
            (t("mask_logits", f, ("prompts", SIDE, SIDE)), t("iou", f, ("prompts",))),
            {"prompts": DimRange(1, 1, MAX_PROMPTS), "points": DimRange(1, 1, MAX_POINTS)},
        ),
    }


def native_graphs(model: NativeModel, specs: Mapping[str, GraphSpec]) -> dict[str, onnx.ModelProto]:
    """Return the four fp32 ONNX models, by role."""
    tensors = {k: v.detach().float().numpy() for k, v in model.decoder.state_dict().items()}
    return {
        "vision_encoder": export_module(model.vision_encoder, specs["vision_encoder"]),
        "projector": export_module(model.projector, specs["projector"]),
        "decoder": build_decoder_graph(model.decoder.config, tensors, specs["decoder"]),
        "mask_decoder": export_module(model.mask_decoder, specs["mask_decoder"]),
    }


def export_module(module: nn.Module, spec: GraphSpec) -> onnx.ModelProto:
    """Return the ONNX model of a torch module whose forward takes the spec's inputs in order and gives its outputs."""
    sizes = {name: min(r.max, r.opt + 1) for name, r in spec.dims.items()}  # above 1, so that no dim is taken as fixed
    inputs = tuple(_sample(t, sizes) for t in spec.inputs)
    dims = {name: torch.export.Dim(name, min=r.min, max=r.max) for name, r in spec.dims.items()}
    dynamic = tuple({i: dims[d] for i, d in enumerate(t.shape) if isinstance(d, str)} or None for t in spec.inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells at length that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            module.eval(), inputs, dynamo=True, verbose=False, optimize=True,
            input_names=[t.name for t in spec.inputs], output_names=[t.name for t in spec.outputs],
            dynamic_shapes=dynamic if any(dynamic) else None,
        )  # fmt: skip
    buffer = io.BytesIO()
    assert program is not None
    onnx.save(program.model_proto, buffer)
    model = onnx.load_from_string(buffer.getvalue())
    for node in model.graph.node:  # names and traces of the machine that exported it do not belong in a bundle
        del node.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    return model


def _sample(tensor: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    shape: Sequence[int] = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
    return torch.zeros(*shape, dtype=getattr(torch, tensor.dtype))
