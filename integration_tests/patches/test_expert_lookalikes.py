"""Experts like gpt-oss's but for one thing: it is read right, or the proof finds it out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from lorafuse.kernels.clamped_swiglu import ClampedSwiglu
from lorafuse.patches.apply import FusedModel, apply
from lorafuse.patches.structure import BUILTIN_STRUCTURES, Experts, recognise_experts

from .conftest import SMALL

GATE = "its experts' gate is not act(gate) * up"
PROOF = "verification in fp32"


class Plain(GptOssExperts):
    """A loop over all experts, in pieces that can be changed one at a time."""

    def forward(self, hidden_states, router_indices=None, routing_weights=None):
        y = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            tokens, j = torch.where(router_indices == e)
            weights = routing_weights[tokens, j, None]
            out = self.expert(e, hidden_states[tokens], weights)
            y = y.index_add(0, tokens, out.to(y.dtype))
        return y

    def expert(self, e: int, x: Tensor, weights: Tensor) -> Tensor:
        gate_up = x @ self.gate_up_proj[e] + self.gate_up_proj_bias[e]
        return (self.gated(gate_up) @ self.down_proj[e] + self.down_proj_bias[e]) * weights

    def gated(self, gate_up: Tensor) -> Tensor:
        return self._apply_gate(gate_up)


def gate(alpha: float = 1.702, limit: float = 7.0, halves: bool = False) -> Callable[..., Tensor]:
    """gpt-oss's own gate with other numbers."""

    def apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1) if halves else (gate_up[..., ::2], gate_up[..., 1::2])
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * alpha)

    return apply_gate


class OtherAlphaInside(Plain):
    gated = gate(alpha=1.6)


class OtherLimitInside(Plain):
    gated = gate(limit=6.0)


class NoLimitInside(Plain):
    gated = gate(limit=1e9)


class InHalvesInside(Plain):
    gated = gate(halves=True)


class InHalves(Plain):
    _apply_gate = gate(halves=True)


class UnknownLimit(Plain):
    _apply_gate = gate(limit=5.0)


class OtherAlphaUnderAHighLimit(Plain):
    """Where all gates are at the limit, no alpha shows."""

    _apply_gate = gate(alpha=1.6, limit=1e6)


class ClampsGateBelow(Plain):
    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(-self.limit, self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


class ClampsNoUp(Plain):
    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2].clamp(max=self.limit), gate_up[..., 1::2]
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


class UpIsGate(Plain):
    def _apply_gate(self, gate_up):
        return super()._apply_gate(gate_up.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


class ScaledBias(Plain):
    def expert(self, e, x, weights):
        gate_up = x @ self.gate_up_proj[e] + 2 * self.gate_up_proj_bias[e]
        return (self.gated(gate_up) @ self.down_proj[e] + self.down_proj_bias[e]) * weights


class UnweightedBias(Plain):
    """The bias of down is added after the router's weight: its gradient has no <dy, b>."""

    def expert(self, e, x, weights):
        gate_up = x @ self.gate_up_proj[e] + self.gate_up_proj_bias[e]
        return self.gated(gate_up) @ self.down_proj[e] * weights + self.down_proj_bias[e]


class NeighboursBias(Plain):
    def expert(self, e, x, weights):
        gate_up = x @ self.gate_up_proj[e] + self.gate_up_proj_bias[e - 1]
        return (self.gated(gate_up) @ self.down_proj[e] + self.down_proj_bias[e]) * weights


class ReadTransposed(Plain):
    """[E, I, H] with I = H, read as [E, H, I]."""

    def expert(self, e, x, weights):
        gate_up = x @ self.gate_up_proj[e] + self.gate_up_proj_bias[e]
        return (self.gated(gate_up) @ self.down_proj[e].t() + self.down_proj_bias[e]) * weights


@dataclass(frozen=True)
class Case:
    """Experts of a class, with some attributes, and why they are not fused; "" where they are."""

    kind: type[nn.Module]
    reason: str = ""
    attributes: tuple[tuple[str, Any], ...] = ()


CASES = {
    "as it is": Case(Plain),
    "other alpha": Case(Plain, attributes=(("alpha", 1.3),)),
    "low limit": Case(Plain, attributes=(("limit", 0.125),)),
    "no limit": Case(Plain, attributes=(("limit", float("inf")),)),
    "a limit that nothing reaches": Case(Plain, attributes=(("limit", 1e30), ("alpha", 1.3))),
    "in halves": Case(InHalves),
    "other alpha inside": Case(OtherAlphaInside, PROOF),
    "other limit inside": Case(OtherLimitInside, PROOF),
    "no limit inside": Case(NoLimitInside, PROOF),
    "in halves inside": Case(InHalvesInside, PROOF),
    "unknown limit": Case(UnknownLimit, GATE),
    "unknown alpha": Case(OtherAlphaUnderAHighLimit, GATE, (("limit", 1e6),)),
    "clamps the gate below": Case(ClampsGateBelow, GATE),
    "does not clamp up": Case(ClampsNoUp, GATE),
    "up is the gate": Case(UpIsGate, GATE),
    "scaled bias": Case(ScaledBias, PROOF),
    "unweighted bias": Case(UnweightedBias, PROOF),
    "the neighbour's bias": Case(NeighboursBias, PROOF),
    "read transposed": Case(ReadTransposed, PROOF),
    "declared otherwise": Case(
        Plain, "its experts' weights are not as is_transposed says", (("is_transposed", False),)
    ),
}


def experts_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, GptOssExperts)]


@pytest.fixture
def make(make_peft) -> Callable[..., Any]:
    """gpt-oss with other experts; adapted in both weights, biases zero as in a fresh model."""

    def build(case: Case, zero: bool = True) -> Any:
        config = GptOssConfig(
            **{**SMALL, "intermediate_size": 64}, head_dim=16, num_local_experts=4,
            num_experts_per_tok=2, sliding_window=8,
        )  # fmt: skip
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = make_peft(
            config, attention="eager", target_modules=["q_proj"], target_parameters=parameters
        )
        for module in experts_of(model):
            module.__class__ = case.kind
            for name, value in case.attributes:
                setattr(module, name, value)
            for bias in (module.gate_up_proj_bias, module.down_proj_bias):
                bias.data.mul_(0.0 if zero else 1.0)
        return model

    return build


def check(fused: FusedModel, reason: str) -> None:
    records = [r for r in fused.records if r.operation == "moe"]
    assert len(records) == 2
    for record in records:
        assert record.fused == (not reason), record
        assert record.reason.startswith(reason) and bool(record.calls) == record.fused, record


@pytest.mark.parametrize("zero", [True, False], ids=["biases zero", "biases"])
@pytest.mark.parametrize("name", list(CASES))
def test_it_trains_as_stock_and_says_why(name, zero, make, step, close) -> None:
    case = CASES[name]
    model = make(case, zero)
    stock = step(model)
    fused = apply(model, {"moe": True})
    close(step(model), stock)
    check(fused, case.reason)


@pytest.mark.parametrize(
    "wrong",
    [
        ClampedSwiglu(1.702, 7.5, 1.0, True),
        ClampedSwiglu(1.702, 7.0, 0.0, True),
        ClampedSwiglu(1.702, 7.0, 1.0, False),
        ClampedSwiglu(1.71, 7.0, 1.0, True),
        ClampedSwiglu(1.702, float("inf"), 1.0, True),
    ],
    ids=["limit", "offset", "halves", "alpha", "no limit"],
)
def test_a_wrong_reading_is_found_out(wrong, make) -> None:
    def lie(module: nn.Module) -> Experts | None:
        found = recognise_experts(module)
        if found is None:
            return None
        return Experts(found.module, found.base, found.gate_up, found.down, wrong, transposed=True)

    model = make(CASES["as it is"])
    for module in model.modules():  # a third party's is asked only where there are adapters
        if type(module).__name__ == "GptOssMLP":
            module.adapted = next(m for m in model.modules() if hasattr(m, "lora_A"))
    structures = [lie if one is recognise_experts else one for one in BUILTIN_STRUCTURES]
    check(apply(model, {"moe": True}, structures=structures), PROOF)


def test_what_is_read(make) -> None:
    """alpha and the limit are the module's own, or its config's."""
    model = make(CASES["low limit"])
    for module in experts_of(model):
        found = recognise_experts(module)
        assert found is not None and found.transposed and not found.problem
        assert found.activation == ClampedSwiglu(1.702, 0.125, 1.0, True)
        del module.limit
        module.config.swiglu_limit = 3.0
        module._apply_gate = gate(limit=3.0).__get__(module)
        found = recognise_experts(module)
        assert found is not None and found.activation == ClampedSwiglu(1.702, 3.0, 1.0, True)


def test_a_change_of_alpha_in_one_layer_is_that_layers(make, step, close) -> None:
    """One proof does not serve both, nor is one's number used for the other."""
    model = make(CASES["as it is"])
    experts_of(model)[1].alpha = 0.9
    stock = step(model)
    fused = apply(model, {"moe": True})
    close(step(model), stock)
    check(fused, "")
