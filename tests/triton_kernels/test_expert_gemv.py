"""The NumPy reference against the torch module, and the kernels under the interpreter against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgemed.errors import InvalidInput
from edgemed.models.moe import TopOneExperts
from edgemed.triton_kernels.expert_gemv import FORMATS, expert_gemv, run_expert_gemv
from edgemed.triton_kernels.weights import Matrix, pack


def experts(form: str, width: int, inner: int) -> tuple[Matrix, Matrix]:
    rng = np.random.default_rng(width)
    gate_up = rng.normal(0, 1 / math.sqrt(width), (3, 2 * inner, width)).astype(np.float32)
    down = rng.normal(0, 1 / math.sqrt(inner), (3, width, inner)).astype(np.float32)
    return pack(gate_up, form), pack(down, form)


def test_reference_equals_the_torch_module() -> None:
    torch.manual_seed(0)
    module = TopOneExperts(48, 80, experts=3)
    x = torch.randn(48).half()
    gate_up = np.stack([expert.gate_up.weight.detach().numpy() for expert in module.experts])
    down = np.stack([expert.down.weight.detach().numpy() for expert in module.experts])
    packed = pack(gate_up, "fp16"), pack(down, "fp16")
    for index, expert in enumerate(module.experts):
        expert.gate_up.weight.data = torch.from_numpy(packed[0].to_float32()[index])
        expert.down.weight.data = torch.from_numpy(packed[1].to_float32()[index])
    out, probabilities = module(x.float()[None])
    chosen = int(probabilities.detach().argmax())
    found = expert_gemv(x.numpy(), *packed, chosen, float(probabilities.detach().max()))
    np.testing.assert_allclose(found, out[0].detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("width", "inner"), [(64, 128), (101, 70), (1056, 33)], ids=["round", "odd", "wide"])
def test_kernel_equals_the_reference(interpret: Callable[..., Any], form: str, width: int, inner: int) -> None:
    x = np.random.default_rng(1).normal(0, 1, width).astype(np.float16)
    matrices = experts(form, width, inner)
    expected = expert_gemv(x, *matrices, 2, 0.7)
    found = interpret(run_expert_gemv, x, *matrices, 2, 0.7)
    assert found.dtype == np.float16
    # Sums are float32 in another order; the result is rounded to float16, whose step is 2 ** -11 of a value.
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-11, atol=2e-5)


def test_only_the_chosen_expert_is_read(interpret: Callable[..., Any]) -> None:
    x = np.ones(64, np.float16)
    gate_up, down = experts("fp16", 64, 40)
    expected = interpret(run_expert_gemv, x, gate_up, down, 1, 1.0)
    for matrix in (gate_up, down):
        matrix.values[[0, 2]] = np.nan
    np.testing.assert_array_equal(interpret(run_expert_gemv, x, gate_up, down, 1, 1.0), expected)


def test_large_gates_do_not_overflow(interpret: Callable[..., Any]) -> None:
    x = np.full(32, 100, np.float16)
    gate_up = pack(np.concatenate([np.full((1, 8, 32), -1.0), np.full((1, 8, 32), 1.0)], axis=1), "fp16")
    down = pack(np.ones((1, 32, 8)), "fp16")
    assert not expert_gemv(x, gate_up, down, 0, 1.0).any()
    assert not interpret(run_expert_gemv, x, gate_up, down, 0, 1.0).any()


def test_an_expert_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidInput, match="expert 3; 0 to 2"):
        expert_gemv(np.ones(64, np.float16), *experts("fp16", 64, 40), 3, 1.0)


def test_shapes_that_do_not_fit_are_refused(interpret: Callable[..., Any]) -> None:
    gate_up, down = experts("fp16", 64, 40)
    with pytest.raises(InvalidInput, match="were expected"):
        expert_gemv(np.ones(32, np.float16), gate_up, down, 0, 1.0)
    with pytest.raises(InvalidInput, match="were expected"):
        interpret(run_expert_gemv, np.ones(64, np.float16), gate_up, gate_up, 0, 1.0)


def test_kernel_refuses_formats_that_differ(interpret: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="experts in fp16 and int8_block32"):
        interpret(
            run_expert_gemv,
            np.ones(64, np.float16),
            experts("fp16", 64, 32)[0],
            experts("int8_block32", 64, 32)[1],
            0,
            1.0,
        )
