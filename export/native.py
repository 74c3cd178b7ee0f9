"""The native family's four graphs: torch modules -> ONNX, as the GraphSpec of each says (`native_torch`).

Vision encoder, projector and mask decoder are exported by torch; the decoder is written node by node
(`decoder_graph`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import onnx

from edgemed.export.decoder_graph import build_decoder_graph
from edgemed.export.traced_graph import build_traced_graph
from edgemed.families.native_torch import NativeModel
from edgemed.graphs import GraphSpec


def native_graphs(model: NativeModel, specs: Mapping[str, GraphSpec]) -> dict[str, onnx.ModelProto]:
    """Return the four fp32 ONNX models, by role."""
    decoder = build_decoder_graph(model.decoder.config, model.decoder.state_dict(), specs["decoder"])
    traced = {
        role: build_traced_graph(copy.deepcopy(module), module.state_dict(), specs[role])
        for role, module in model.named_children()
        if role != "decoder"
    }
    return {role: traced.get(role, decoder) for role in specs}
