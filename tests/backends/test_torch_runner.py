"""The torch Runner, on modules of a few operations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgemed.backends import Runner, open_runner
from edgemed.errors import BackendUnavailable, DeviceOutOfMemory, InvalidInput, OutOfMemory
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

PLAIN = GraphSpec(
    role="projector",
    inputs=(TensorSpec("a", "float32", ("n", 3)), TensorSpec("b", "int64", (1,))),
    outputs=(TensorSpec("sum", "float32", ("n", 3)), TensorSpec("kind", "int64", (1,))),
    dims={"n": DimRange(1, 2, 4)},
)
COUNTER = GraphSpec(
    role="decoder",
    inputs=(TensorSpec("step", "float32", (1,)), TensorSpec("past", "float32", ("cache",))),
    outputs=(TensorSpec("seen", "float32", ()), TensorSpec("present", "float32", ("cache",))),
    dims={"cache": DimRange(5, 5, 5)},
    state=(("present", "past"),),
)


class Plain(nn.Module):
    """Adds its weight and b to a; where b is above 9, fails as b tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.errors: dict[int, Exception] = {
            10: ValueError("too many tokens.\nand more"),
            11: RuntimeError("The size of tensor a must match"),
            12: RuntimeError("[enforce fail at a.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: x"),
            13: MemoryError(),
            14: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        }

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if int(b) in self.errors:
            raise self.errors[int(b)]
        assert torch.is_inference_mode_enabled()
        return (a + b).double() + self.weight, b


class Counter(nn.Module):
    """Adds up what it gets in all five places; returns the total, without the state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(5), persistent=False)
        self.past: Tensor

    def forward(self, step: Tensor) -> Tensor:
        self.past += step
        return self.past.sum()

    def reset(self) -> None:
        self.past.zero_()


def feeds(n: int = 2, b: int = 0) -> dict[str, np.ndarray]:
    return {"a": np.ones((n, 3), np.float32), "b": np.array([b], np.int64)}


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain() -> Runner:
    return open_runner("torch", Plain, PLAIN, device="cpu")


def test_inputs_and_outputs_go_by_the_order_of_the_spec(plain: Runner) -> None:
    assert (plain.backend, plain.device) == ("torch", "CPU")
    kept = [plain.run(feeds(n, n)) for n in (2, 4, 1)]
    for n, out in zip((2, 4, 1), kept, strict=True):  # earlier results are not overwritten by later runs
        assert list(out) == ["sum", "kind"]
        assert (out["sum"].dtype, out["kind"].dtype) == (np.float32, np.int64)
        assert np.array_equal(out["sum"], np.tile([2, 3, 4], (n, 1)) + n)


def test_feeds_that_torch_cannot_take_as_they_are_are_copied(plain: Runner) -> None:
    turned = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::-1].T
    turned.flags.writeable = False
    assert np.array_equal(plain.run({**feeds(), "a": turned})["sum"], turned + np.array([1, 2, 3]))


@pytest.mark.parametrize("wrong", [{}, {"a": np.ones((2, 3))}, {"a": np.ones((5, 3), np.float32)}])
def test_feeds_that_do_not_fit_name_the_graph(plain: Runner, wrong: dict[str, np.ndarray]) -> None:
    with pytest.raises(InvalidInput, match="projector"):
        plain.run({"b": np.zeros(1, np.int64), **wrong})


def test_state_stays_inside_until_reset() -> None:
    runner = open_runner("torch", Counter, COUNTER, device="cpu")
    step = {"step": np.array([2], np.float32)}
    assert [float(runner.run(step)["seen"]) for _ in range(3)] == [10, 20, 30]
    runner.reset()
    assert float(runner.run(step)["seen"]) == 10


def test_a_graph_without_state_has_nothing_to_reset(plain: Runner) -> None:
    plain.reset()


def test_a_closed_runner_says_so(plain: Runner) -> None:
    plain.close()
    with pytest.raises(InvalidInput, match="closed"):
        plain.run(feeds())


@pytest.mark.parametrize(
    ("b", "kind", "said"),
    [
        (10, InvalidInput, "graph projector cannot run on these inputs: too many tokens"),
        (11, InvalidInput, "graph projector cannot run on these inputs: The size of tensor a must match"),
        (12, OutOfMemory, "graph projector does not fit in the memory: DefaultCPUAllocator: can't allocate memory: x; "
         "use a machine with more memory"),
        (13, OutOfMemory, "graph projector does not fit in the memory: MemoryError; use a machine with more memory"),
        (14, DeviceOutOfMemory, "graph projector does not fit in the memory of CPU: CUDA out of memory. Tried to "
         "allocate 20 GiB; use --device cpu or a larger GPU"),
    ],
)  # fmt: skip
def test_what_torch_raises_is_told_in_one_line(plain: Runner, b: int, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        plain.run(feeds(b=b))
    assert str(caught.value) == said
    assert plain.run(feeds())["kind"] == 0


def test_weights_that_do_not_fit_the_memory_are_told_as_well() -> None:
    def huge() -> nn.Module:
        return nn.Linear(1 << 24, 1 << 24)

    with pytest.raises(OutOfMemory, match="graph projector does not fit in the memory"):
        open_runner("torch", huge, PLAIN, device="cpu")


def test_errors_of_loading_that_are_not_of_memory_stay_as_they_are() -> None:
    def wrong() -> nn.Module:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        open_runner("torch", wrong, PLAIN, device="cpu")


def test_the_thread_that_runs_gets_the_threads_asked_for(threads: None) -> None:
    torch.set_num_threads(2)
    runner = open_runner("torch", Plain, PLAIN, device="cpu", threads=1)
    runner.run(feeds())
    assert torch.get_num_threads() == 1


def test_a_graph_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"runs the folder of a checkpoint, decoder\.onnx is a graph of a bun"):
        open_runner("torch", tmp_path / "decoder.onnx", PLAIN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["gpu", "gpu:1"])
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(device: str) -> None:
    def never() -> nn.Module:
        raise AssertionError("no weight is read")

    with pytest.raises(BackendUnavailable, match=r"finds 0 GPUs: .* or use --device cpu"):
        open_runner("torch", never, PLAIN, device=device)
    assert open_runner("torch", Plain, PLAIN, device="auto").device == "CPU"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["auto", "gpu", "gpu:0"])
def test_a_gpu_computes_what_the_cpu_does(device: str) -> None:
    convolution = GraphSpec(
        "vision_encoder",
        (TensorSpec("a", "float32", (1, 64, 32, 32)),),
        (TensorSpec("b", "float32", (1, 64, 30, 30)),),
    )
    torch.manual_seed(0)
    module = nn.Conv2d(64, 64, 3)
    state = module.state_dict()

    def load() -> nn.Module:
        made = nn.Conv2d(64, 64, 3)
        made.load_state_dict(state)
        return made

    a = {"a": np.random.default_rng(0).normal(size=(1, 64, 32, 32)).astype(np.float32)}
    on_gpu = open_runner("torch", load, convolution, device=device)
    assert on_gpu.device == "GPU 0"
    expected = open_runner("torch", load, convolution, device="cpu").run(a)["b"]
    np.testing.assert_allclose(on_gpu.run(a)["b"], expected, rtol=0, atol=1e-5)  # TF32 is off by 1e-3
    assert torch.backends.cudnn.allow_tf32
    on_gpu.close()
