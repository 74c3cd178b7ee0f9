"""The onnxruntime back end: graphs on the CPU, or on an NVIDIA GPU with onnxruntime-gpu.

State lives in fixed buffers that are bound as an input and as the output that replaces it, so a cache is updated in
place and never copied. A graph of which a GPU would leave a part to the CPU, sizes aside, is refused there. Covers no
quantization and no engine building.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.backends import Device, Outputs, empty_state
from edgemed.errors import BackendUnavailable, BundleError, DeviceOutOfMemory, EdgemedError, InvalidInput, OutOfMemory
from edgemed.graphs import Feeds, GraphSpec

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_NEVER = ["ReluQuantRewrite"]
"""Left out: of onnxruntime 1.31, drops a Relu before the pairs of FP8, and all that was below 0 comes through."""
_FP8_PAIRS = ["QDQSelectorActionTransformer"]
"""Left out for FP8: this optimizer of onnxruntime 1.31 turns its pairs into integer operators, which refuse FP8."""

_SIZES = frozenset(
    (
        *("Add", "And", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Greater"),
        *("GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range"),
        *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub"),
        *("Unsqueeze", "Where"),
    )
)
"""Standard operators that compute sizes and positions from sizes."""

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_FATAL_ONLY = 4  # errors arrive as exceptions; onnxruntime would print them on stderr too


class OnnxRuntimeRunner:
    """Runs one ONNX file; see `edgemed.backends.Runner`."""

    backend = "onnxruntime"

    def __init__(self, artifact: Path, spec: GraphSpec, *, device: Device, threads: int | None = None) -> None:
        import onnxruntime

        self.spec = spec
        self._on_gpu = _use_gpu(device, onnxruntime.get_available_providers())
        self.device = f"GPU {device.index}" if self._on_gpu else "CPU"
        self._session: Any = _open_session(artifact, self._on_gpu, device.index, threads)
        self._check_names(artifact)
        place = ("cuda", device.index) if self._on_gpu else ("cpu", 0)
        self._state = self._make_state(place)
        self._returned = [t.name for t in spec.returned_outputs]
        self._binding: Any = self._session.io_binding()
        for output, name in spec.state:
            self._binding.bind_ortvalue_input(name, self._state[name])
            self._binding.bind_ortvalue_output(output, self._state[name])
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = _FATAL_ONLY
        # That no GPU graph is captured: onnxruntime 1.31 looks it up in each run, and where it is not said raises and
        # catches an error, 0.09 ms of a step.
        self._options.add_run_config_entry("gpu_graph_id", "-1")

    def run(self, feeds: Feeds) -> Outputs:
        """Return the outputs that are not state. Raises InvalidInput where `feeds` do not fit the GraphSpec."""
        if self._session is None:
            raise InvalidInput(f"graph {self.spec.role}: this Runner was closed")
        self.spec.check(feeds)
        # Bound by address, so this dict must live until the run is over.
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in contiguous.items():
            self._binding.bind_cpu_input(name, array)
        for name in self._returned:
            self._binding.bind_output(name, "cpu")  # again each time: the shape may differ from the last call's
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise _run_error(self.spec.role, error, self._on_gpu) from error
        # In the order they were first bound: the state, then what is returned. Copying them all would copy the cache.
        # As a vector: a list of all of them takes 0.15 ms a step where there are 60 (SmolLM2).
        values, first = self._binding.get_outputs_as_ortvaluevector(), len(self.spec.state)
        return {name: values[first + i].numpy() for i, name in enumerate(self._returned)}

    def reset(self) -> None:
        """Forget the state: every value of it is zero again."""
        for name, zeros in empty_state(self.spec).items():
            if name in self._shared:
                self._shared[name].fill(0)
            else:
                self._state[name].update_inplace(zeros)

    def close(self) -> None:
        """Give back memory and device. The Runner cannot run afterwards."""
        self._binding = self._session = None
        self._state.clear()

    def _make_state(self, place: tuple[str, int]) -> dict[str, Any]:
        """Return the state's buffers, zero. NumPy has no bfloat16: such a buffer shares the memory of uint16."""
        from onnxruntime import OrtValue

        kinds = {t.name: t.dtype for t in self.spec.inputs}
        self._shared: dict[str, Any] = {}
        made = {}
        for name, zeros in empty_state(self.spec).items():
            if kinds[name] != "bfloat16":
                made[name] = OrtValue.ortvalue_from_numpy(zeros, *place)  # on the CPU it shares the array's memory
            elif self._on_gpu:
                raise BackendUnavailable(
                    f"onnxruntime has no bfloat16 state on a GPU ({name}); use --backend tensorrt, or a bundle in fp16"
                )
            else:
                self._shared[name] = zeros
                made[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, _BFLOAT16)
        return made

    def _check_names(self, artifact: Path) -> None:
        """Raise BundleError where the file's inputs or outputs are not those of the spec."""
        for kind, found, expected in (
            ("inputs", self._session.get_inputs(), self.spec.inputs),
            ("outputs", self._session.get_outputs(), self.spec.outputs),
        ):
            names, wanted = {t.name for t in found}, {t.name for t in expected}
            if names != wanted:
                raise BundleError(
                    f"{artifact.name} has {kind} {', '.join(sorted(names))}; the bundle's description says "
                    f"{', '.join(sorted(wanted))}. Get the bundle again"
                )


def _use_gpu(device: Device, providers: list[str]) -> bool:
    """Return whether to run on a GPU. Raises BackendUnavailable where one is asked for that onnxruntime cannot use."""
    if device.kind == "gpu" and _CUDA not in providers:
        raise BackendUnavailable(
            f"device gpu was asked for, but this onnxruntime has no {_CUDA}. Install edgemed[gpu-ort] in place of "
            "edgemed[cpu], or use --device cpu"
        )
    return device.kind == "gpu" or (device.kind == "auto" and _CUDA in providers)


def _open_session(artifact: Path, on_gpu: bool, index: int, threads: int | None) -> Any:
    """Return an InferenceSession of `artifact` on exactly the device that was chosen."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    # Threads wait actively inside a run (a decoder step is some 40 short operations) but not between runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[Any] = [(_CUDA, {"device_id": str(index)})] if on_gpu else []
    if on_gpu:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")

    def start(*left_out: str) -> Any:
        without = [*_NEVER, *left_out]
        return onnxruntime.InferenceSession(
            str(artifact), options, providers=[*providers, _CPU], disabled_optimizers=without
        )

    try:
        try:
            session = start()
        except Exception as error:
            if "float8" not in str(error):
                raise
            session = start(*_FP8_PAIRS)
        session.disable_fallback()
    except Exception as error:
        raise _load_error(artifact, error) from error
    if on_gpu and _CUDA not in session.get_providers():
        raise BackendUnavailable(
            f"onnxruntime could not start {_CUDA} on GPU {index}: check the NVIDIA driver and the CUDA and cuDNN "
            "libraries (edgemed[gpu-ort]), or use --device cpu"
        )
    if on_gpu and (left := left_on_cpu(session)):
        raise BackendUnavailable(
            f"{_CUDA} does not run {', '.join(left)} of {artifact.name}, which would run on the CPU in silence. Use "
            "--device cpu, or a bundle made with `edgemed export --target tensorrt`"
        )
    return session


def left_on_cpu(session: Any) -> list[str]:
    """Return the operators that a session runs on the CPU, but for those that may compute sizes there, sorted.

    The session recorded where its nodes went. onnxruntime leaves sizes to the CPU by intention, so that its option
    session.disable_cpu_ep_fallback, which refuses every node there, would refuse each of our decoders.
    """
    nodes = (
        n for part in session.get_provider_graph_assignment_info() if part.ep_name == _CPU for n in part.get_nodes()
    )
    return sorted({node.op_type for node in nodes if node.domain not in ("", "ai.onnx") or node.op_type not in _SIZES})


def _load_error(artifact: Path, error: Exception) -> EdgemedError:
    """Return the error to raise where onnxruntime refuses a file."""
    reason = _first_line(error)
    if "CUDA" in reason:
        return BackendUnavailable(f"onnxruntime could not start the GPU: {reason}. Or use --device cpu")
    if _is_memory(reason):
        return OutOfMemory(f"{artifact.name} does not fit in memory: {reason}")
    if reason.startswith("Could not find an implementation"):
        return BundleError(
            f"{artifact.name} has an operator in a type that onnxruntime does not compute here: {reason}. Use a bundle "
            "in another precision, or another back end"
        )
    return BundleError(f"{artifact.name} cannot be opened by onnxruntime: {reason}. Get the bundle again")


def _run_error(role: str, error: Exception, on_gpu: bool) -> EdgemedError:
    """Return the error to raise where a run fails on inputs that fit the spec."""
    reason = _first_line(error)
    if _is_memory(reason):
        kind = DeviceOutOfMemory if on_gpu else OutOfMemory
        return kind(f"graph {role} ran out of memory: {reason}")
    return InvalidInput(f"graph {role} cannot run on these inputs: {reason}")


def _first_line(error: Exception) -> str:
    """Return onnxruntime's reason in one line, without its codes and without the rest of a stack.

    >>> _first_line(RuntimeError("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load failed."))
    'Load failed'
    """
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text.strip().rstrip(".")


def _is_memory(reason: str) -> bool:
    lowered = reason.lower()
    return any(sign in lowered for sign in ("failed to allocate", "bad_alloc", "out of memory", "bad allocation"))


def physical_cores() -> int:
    """Return how many physical cores this process may use, at least 1; where that is not known, the logical ones."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1))
    logical = os.sched_getaffinity(0)
    siblings = set()
    for cpu in logical:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(logical)
    return max(1, len(siblings))
