"""Top-1 experts against one token at a time, and inside a decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgemed.models.llama import LlamaConfig
from edgemed.models.moe import MoeBlock, MoeLlama, TopOneExperts

SMALL = LlamaConfig(vocabulary=40, width=24, layers=3, heads=4, kv_heads=2, head_dim=6, inner=36, bins=0)


def make(experts: int = 2) -> TopOneExperts:
    torch.manual_seed(1)
    return TopOneExperts(24, 36, experts).eval()


def plain(model: TopOneExperts, token: Tensor) -> tuple[Tensor, Tensor]:
    """The equations for one token [width] in float64; (out, probabilities)."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    x = token.double()
    scores = torch.exp(w["router.weight"] @ x)
    p = scores / scores.sum()
    e = max(range(len(p)), key=lambda i: (p[i].item(), -i))
    gate, up = (w[f"experts.{e}.gate_up.weight"] @ x).chunk(2)
    return p[e] * (w[f"experts.{e}.down.weight"] @ (gate / (1 + torch.exp(-gate)) * up)), p


@pytest.mark.parametrize(("experts", "shape"), [(2, (1, 9)), (3, (2, 5)), (5, (1,)), (1, (4,))])
def test_tokens_equal_the_plain_equations(experts: int, shape: tuple[int, ...]) -> None:
    model, x = make(experts), torch.randn(*shape, 24) * 3
    with torch.no_grad():
        out, probabilities = model(x)
    expected = [plain(model, token) for token in x.flatten(0, -2)]
    torch.testing.assert_close(out.flatten(0, -2).double(), torch.stack([o for o, _ in expected]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        probabilities.flatten(0, -2).double(), torch.stack([p for _, p in expected]), atol=1e-6, rtol=1e-5
    )


def test_each_token_is_computed_by_one_expert_and_none_is_dropped() -> None:
    model, seen = make(), []
    for expert in model.experts:
        expert.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    x = torch.randn(1, 50, 24)
    x[0, :, 0] = 40 * torch.sign(model.router.weight[1, 0] - model.router.weight[0, 0]).detach()  # all to one expert
    with torch.no_grad():
        out, probabilities = model(x)
    assert (probabilities.argmax(-1) == 1).all()
    assert seen == [0, 50]
    assert (out.abs().amax(-1) > 0).all()


def test_equal_probabilities_go_to_the_first_expert() -> None:
    model, x = make(), torch.randn(3, 24)
    with torch.no_grad():
        model.router.weight.zero_()
        out, probabilities = model(x)
        torch.testing.assert_close(out, model.experts[0](x) * 0.5)
    assert (probabilities == 0.5).all()


def test_the_router_stays_fp32_under_autocast_and_in_a_bf16_model() -> None:
    x = torch.randn(1, 64, 24)
    model = make()
    with torch.no_grad():
        exact = model(x)[1]
        with torch.autocast("cpu", torch.bfloat16):
            out, under_autocast = model(x)
        assert torch.equal(under_autocast, exact)
        assert out.dtype == torch.float32
        lowered = model.to(torch.bfloat16)
        lowered.router.float()
        out, probabilities = lowered(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert probabilities.dtype == torch.float32


def test_every_weight_learns_when_both_experts_are_chosen() -> None:
    model = make()
    out, probabilities = model(torch.randn(1, 64, 24))
    assert len(probabilities.argmax(-1).unique()) == 2
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def llama(experts: tuple[int, ...]) -> MoeLlama:
    torch.manual_seed(2)
    model = MoeLlama(SMALL, experts).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


def test_a_decoder_may_have_dense_layers_between_layers_with_experts() -> None:
    model = llama((2, 1, 3))
    x, positions = torch.randn(1, 7, SMALL.width), torch.arange(7)[None]
    with torch.no_grad():
        hidden, routed = model.forward_routed(x, positions)
        assert torch.equal(hidden, model(x, positions))
    assert [tuple(p.shape) for p in routed] == [(1, 7, 2), (1, 7, 3)]
    assert [isinstance(layer, MoeBlock) for layer in model.layers] == [True, False, True]
    names = [n.removeprefix("layers.0.") for n in model.state_dict() if n.startswith("layers.0.")]
    assert "mlp.router.weight" in names
    assert not any(n.startswith(("gate_up", "down")) for n in names)


def test_routed_and_plain_forward_take_the_same_masks() -> None:
    model = llama((2, 2, 1))
    x, positions = torch.randn(2, 6, SMALL.width), torch.arange(6).expand(2, 6)
    mask = torch.ones(2, 6, 6).tril().bool()
    mask[1, :, 2] = False
    mask[1, 2, 2] = True
    with torch.no_grad():
        assert torch.equal(model.forward_routed(x, positions, mask)[0], model(x, positions, mask))


@pytest.mark.parametrize("experts", [(2, 2), (2, 0, 2)])
def test_a_wrong_number_of_experts_is_refused(experts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected for each of 3"):
        MoeLlama(SMALL, experts)
