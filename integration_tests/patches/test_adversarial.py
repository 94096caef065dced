"""Blocks that look like a known one and compute something else are rejected, not trained wrong."""

import pytest
import torch
from torch import nn
from transformers import GraniteConfig, OlmoConfig
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama import modeling_llama as llama

from lorafuse.patches.apply import OPERATIONS, apply

ALL = dict.fromkeys(OPERATIONS, True)


class ScaledResidual(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        h = residual + 0.9 * h
        return h + self.mlp(self.post_attention_layernorm(h))


class DetachedBranch(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        h = hidden_states + h
        return h + self.mlp(self.post_attention_layernorm(h.detach()))


class ExtraNorm(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        h = super().forward(hidden_states, **kwargs)
        return h / h.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()


class Clamped(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs).clamp(-0.5, 0.5)


class Parallel(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        x = self.input_layernorm(hidden_states)
        h, _ = self.self_attn(hidden_states=x, **kwargs)
        return hidden_states + h + self.mlp(self.post_attention_layernorm(hidden_states))


class SwappedGate(llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class LyingActivation(llama.LlamaMLP):
    """Says SiLU, computes a tanh GELU."""

    def forward(self, x):
        gate = nn.functional.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class NearlyGelu(llama.LlamaMLP):
    """Exact GELU under an attribute that holds the tanh approximation: 5e-4 apart."""

    def __init__(self, config):
        super().__init__(config)
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


class ClampedMlp(llama.LlamaMLP):
    def forward(self, x):
        return super().forward(x.clamp(-1.0, 1.0))


class OtherScaling(llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        out, weights = super().forward(hidden_states, **kwargs)
        return 1.01 * out, weights


class NotCausal(llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        causal, self.is_causal = self.is_causal, False
        try:
            return super().forward(hidden_states, **kwargs)
        finally:
            self.is_causal = causal


class CenteredNorm(llama.LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class LargeEpsilonNorm(llama.LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.3)


class NamelessMlp(nn.Module):
    """A gated MLP of other names, whose activation stands in its code alone."""

    def __init__(self, hidden: int = 64, inner: int = 128) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
        self.c = nn.Linear(inner, hidden)

    def forward(self, x):
        return self.c(nn.functional.silu(self.a(x)) * self.b(x))


class NamelessSwapped(NamelessMlp):
    def forward(self, x):
        return self.c(nn.functional.silu(self.b(x)) * self.a(x))


class NamelessRelu(NamelessMlp):
    def forward(self, x):
        return self.c(nn.functional.relu(self.a(x)) * self.b(x))


class InPlaceLayer(llama.LlamaDecoderLayer):
    """Changes the outputs of its blocks in place, as Llama 4 does with its shared expert's."""

    def forward(self, hidden_states, **kwargs):
        h, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        h = h.mul_(0.9).add_(hidden_states)
        return self.mlp(self.post_attention_layernorm(h)).mul_(0.9).add_(h)


class DroppingMlp(llama.LlamaMLP):
    def forward(self, x):
        return self.drop(super().forward(x))


class DroppingAttention(llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        out, weights = super().forward(hidden_states, **kwargs)
        return self.drop(out), weights


LAYERS = [ScaledResidual, DetachedBranch, ExtraNorm, Clamped, Parallel]
MLPS = [SwappedGate, LyingActivation, NearlyGelu, ClampedMlp]
ATTENTIONS = [OtherScaling, NotCausal]
NORMS = [CenteredNorm, LargeEpsilonNorm]


def disguise(model, kind) -> None:
    """Gives the blocks of every layer another class in place; weights and adapters stay."""
    for layer in model.get_base_model().model.layers:
        if issubclass(kind, llama.LlamaDecoderLayer):
            layer.__class__ = kind
        elif issubclass(kind, llama.LlamaMLP):
            layer.mlp.__class__ = kind
            if kind is NearlyGelu:
                layer.mlp.act_fn = nn.GELU(approximate="tanh")
        elif issubclass(kind, llama.LlamaAttention):
            layer.self_attn.__class__ = kind
        else:
            layer.input_layernorm.__class__ = kind


@pytest.mark.parametrize("kind", LAYERS + MLPS + ATTENTIONS + NORMS, ids=lambda k: k.__name__)
def test_a_lookalike_is_not_fused_and_trains_as_stock(kind, make_peft, step, close) -> None:
    model = make_peft("llama")
    disguise(model, kind)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    assert not any(r.level == "layer" for r in fused.records)
    whole = {
        **dict.fromkeys(MLPS, "lora_mlp"),
        **dict.fromkeys(ATTENTIONS, "rope"),
        **dict.fromkeys(NORMS, "rms_norm"),
    }.get(kind)
    if whole is not None:
        rejected = [r for r in fused.records if r.operation == whole and not r.fused]
        assert rejected or kind in NORMS, fused.records
        assert all(r.reason for r in rejected)
    else:
        assert any("verification" in note for note in fused.notes), fused.notes
    # what is right in the block is fused on its own
    assert any(r.fused and r.operation == "lora_o" for r in fused.records)


def test_a_residual_multiplier_of_one_block_alone_is_rejected(
    make_peft, step, close, monkeypatch
) -> None:
    """Granite's is read by its name and scales both blocks; here the MLP's is left out."""

    def forward(self, hidden_states, *args, **kwargs):
        scaled, *_ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + scaled * self.residual_multiplier
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(GraniteDecoderLayer, "forward", forward)
    config = GraniteConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        pad_token_id=0,
    )
    model = make_peft(config)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    assert not any(r.level == "layer" for r in fused.records)
    parts = {r.operation for r in fused.records if r.fused and r.calls}
    assert {"lora_mlp", "lora_qkv", "lora_o", "rms_norm"} <= parts


@pytest.mark.parametrize(
    ("kind", "right"), [(NamelessMlp, True), (NamelessSwapped, False), (NamelessRelu, False)]
)
def test_an_mlp_without_known_names_is_fused_where_its_numbers_agree(
    kind, right, make_peft, step, close, tokens
) -> None:
    config = llama.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    base = llama.LlamaForCausalLM(config).to(tokens.device)
    for layer in base.model.layers:
        layer.mlp = kind().to(tokens.device)
    model = make_peft(base)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    mlps = [r for r in fused.records if r.operation == "lora_mlp"]
    assert len(mlps) == 2 and all(r.fused == right for r in mlps), mlps
    assert all(r.calls == 1 if right else "verification" in r.reason for r in mlps), mlps


def test_outputs_may_be_changed_in_place(make_peft, step, close) -> None:
    model = make_peft("llama")
    disguise(model, InPlaceLayer)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    for operation in ("lora_mlp", "lora_qkv", "lora_o"):
        assert all(r.fused and r.calls for r in fused.records if r.operation == operation)


def test_projections_may_be_clamped_in_place(make_peft, step, close) -> None:
    config = OlmoConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, clip_qkv=0.1, pad_token_id=0,
    )  # fmt: skip
    model = make_peft(config)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    assert all(r.fused and r.calls for r in fused.records if r.operation in ("lora_qkv", "lora_o"))


@pytest.mark.parametrize(
    ("kind", "operation"), [(DroppingMlp, "lora_mlp"), (DroppingAttention, "rope")]
)
def test_a_dropout_inside_a_block_draws_its_mask(kind, operation, make_peft, step, close) -> None:
    model = make_peft("llama")
    disguise(model, kind)
    for module in list(model.modules()):
        if isinstance(module, kind):
            module.drop = nn.Dropout(0.5)
    torch.manual_seed(1)
    stock = step(model)
    fused = apply(model, ALL)
    torch.manual_seed(1)
    close(step(model), stock)
    dropped = [r for r in fused.records if r.operation == operation]
    assert all(not r.fused or r.stock_calls for r in dropped), dropped
