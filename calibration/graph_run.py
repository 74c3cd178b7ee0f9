"""Runs an ONNX graph that is in memory, with extra outputs and state, for measuring.

Covers onnxruntime on the CPU. Does not cover answers to users: those run through `edgemed.backends`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from edgemed.backends import empty_state
from edgemed.errors import BundleError
from edgemed.graphs import Feeds, GraphSpec

Array = npt.NDArray[Any]

NO_FUSED_PAIRS = ("QDQSelectorActionTransformer", "ReluQuantRewrite")
"""Optimizers of onnxruntime 1.31 to leave out for FP8: the first turns pairs into integer operators that refuse it, the
second drops a Relu before a pair."""

_FP8 = onnx.TensorProto.FLOAT8E4M3FN


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of `model` that gives these tensors, too; weights are shared in memory until it is serialized."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    there = {o.name for o in result.graph.output}
    result.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in there)
    return result


class GraphRun:
    """A session over a model in memory; state tensors are bound in place and carried from call to call."""

    def __init__(
        self, model: onnx.ModelProto, spec: GraphSpec, *, extra: Sequence[str] = (), threads: int | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors arrive as exceptions
        options.intra_op_num_threads = threads or 0
        if extra:
            model = with_outputs(model, extra)
        disabled = list(NO_FUSED_PAIRS) if has_fp8(model) else []
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise BundleError(f"graph {spec.role} cannot be opened by onnxruntime: {reason}") from error
        self._spec = spec
        self._names = [t.name for t in spec.returned_outputs] + [n for n in extra if n not in _outputs(spec)]
        self._binding = self._session.io_binding()
        self.reset()

    def reset(self) -> None:
        """Make every value of the state zero again."""
        self._state = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(zeros) for name, zeros in empty_state(self._spec).items()
        }
        for output, name in self._spec.state:
            self._binding.bind_ortvalue_input(name, self._state[name])
            self._binding.bind_ortvalue_output(output, self._state[name])

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return the outputs that are not state, and the extra tensors."""
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # bound by address
        for name, array in contiguous.items():
            self._binding.bind_cpu_input(name, array)
        for name in self._names:
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        values = self._binding.get_outputs()[len(self._spec.state) :]
        return {name: value.numpy() for name, value in zip(self._names, values, strict=True)}

    def run_all(self, sequences: Sequence[Sequence[Feeds]]) -> Iterator[dict[str, Array]]:
        """Yield what `run` returns for each call; the state is zero at the start of each sequence."""
        for sequence in sequences:
            if self._spec.state:
                self.reset()
            for feeds in sequence:
                yield self.run(feeds)


def has_fp8(model: onnx.ModelProto) -> bool:
    """Return whether a weight or a zero point of the graph is FP8 (E4M3)."""
    return any(t.data_type == _FP8 for t in model.graph.initializer)


def _outputs(spec: GraphSpec) -> set[str]:
    return {t.name for t in spec.returned_outputs}
