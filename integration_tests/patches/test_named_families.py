"""The families that lorafuse names: each as its released models are built, only smaller.

The table says what is structural in each model (head sizes, biases, norms on q and k, RoPE's
scaling, windows, caps, multipliers, tied embeddings, parallel blocks, experts) and how much of it
is fused. A step's loss and every gradient, and 20 steps of AdamW, are compared with stock: in fp32
here, in bf16 and NF4 on a GPU (`-m gpu`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from sixteen_bit import STEPS, no_further_from_fp32_than_stock
from torch import Tensor, nn
from transformers import PretrainedConfig

from lorafuse.patches.apply import OPERATIONS, FusedModel, apply
from lorafuse.patches.decoder_layer import FusedDecoderLayer

ALL = dict.fromkeys(OPERATIONS, True)
RATE = 2e-3
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64
}  # fmt: skip


def longrope(features: int, part: float = 1.0) -> dict[str, Any]:
    """Phi's, of rows beyond 16 tokens, as those of the tests are."""
    half = int(features * part) // 2
    return {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": part,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + 0.3 * i for i in range(half)],
        "original_max_position_embeddings": 16,
    }  # fmt: skip


def rope(theta: float = 1e4, part: float | None = None) -> dict[str, Any]:
    partial = {} if part is None else {"partial_rotary_factor": part}
    return {"rope_type": "default", "rope_theta": theta, **partial}


@dataclass(frozen=True)
class Named:
    """A family.

    Attributes:
        config: name of transformers' config class, without "Config".
        changes: to `SIZES`, as in the released config.
        layers: decoder layers fused whole.
        fused: operation -> modules in which it is fused and called; nothing: none.
        attention: attn_implementation.
        targets: PEFT's target_modules.
        parameters: PEFT's target_parameters.
    """

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    fused: dict[str, int] = field(default_factory=dict)
    attention: str = "sdpa"
    targets: Any = "all-linear"
    parameters: list[str] | None = None

    def build(self) -> PretrainedConfig:
        config_class: Any = getattr(transformers, f"{self.config}Config")
        config: PretrainedConfig = config_class(**{**SIZES, **self.changes})
        return config

    def without_choice(self) -> "Named":
        """Every token goes to every expert: a rounding can turn no choice over."""
        experts = [self.changes[k] for k in EXPERT_COUNTS if k in self.changes]
        if not experts:
            return self
        every = {"num_experts_per_tok": experts[0]}
        if "n_group" in self.changes:
            every["topk_group"] = self.changes["n_group"]
        return replace(self, changes=self.changes | every)


def fused(mlp: int, qkv: int, o: int, norms: int, rope: int, loss: int = 1) -> dict[str, int]:
    found = {"lora_mlp": mlp, "lora_qkv": qkv, "lora_o": o, "rms_norm": norms, "rope": rope}
    return {**found, "cross_entropy": loss}


WHOLE = fused(2, 2, 2, 5, 2)
BEHIND = fused(2, 2, 2, 9, 2)  # norms in front of the blocks and behind, or on q and k
EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *DENSE]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# bitsandbytes' CPU kernel wants rows of a multiple of 64 (`kernels/nf4.py`).
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 32, "moe_intermediate_size": 64, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
GRANITE = {
    "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 8.0,
    "embedding_multiplier": 12.0, "tie_word_embeddings": True,
}  # fmt: skip

NAMED: dict[str, Named] = {
    "Llama 1": Named("Llama", {"num_key_value_heads": 4}, fused=WHOLE),
    "Llama 2 70B": Named("Llama", {}, fused=WHOLE),
    "Llama 3": Named("Llama", {"rope_parameters": rope(5e5)}, fused=WHOLE),
    "Llama 3.1, 3.3": Named("Llama", {"rope_parameters": LLAMA3}, fused=WHOLE),
    "Llama 3.2": Named(
        "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, fused=WHOLE
    ),
    "Mistral 7B": Named("Mistral", {"sliding_window": 8}, fused=WHOLE),
    "Mistral 7B v0.3": Named("Mistral", {"sliding_window": None}, fused=WHOLE),
    "Mistral Nemo": Named(
        "Mistral", {"head_dim": 32, "sliding_window": None, "rope_parameters": rope(1e6)},
        fused=WHOLE,
    ),
    "Mistral Large": Named(
        "Mistral",
        {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 1, "sliding_window": None},
        fused=WHOLE,
    ),
    "Ministral 8B": Named(
        "Ministral",
        {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8,
         "layer_types": [FULL, *[SLIDING] * 3]},
        layers=4, fused=fused(4, 4, 4, 9, 4),
    ),
    "Ministral 3": Named(
        "Ministral3",
        {"head_dim": 32, "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0,
         "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
        fused=WHOLE,  # below position 64
    ),
    "Gemma 1 2B": Named(
        "Gemma", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
        fused=WHOLE,
    ),
    "Gemma 1 7B": Named(
        "Gemma", {"head_dim": 32, "num_key_value_heads": 4, "tie_word_embeddings": True},
        fused=WHOLE,
    ),
    "Gemma 2": Named(
        "Gemma2",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24,
         "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fused=BEHIND, attention="eager",
    ),
    "Gemma 3": Named(
        "Gemma3Text",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24,
         "layer_types": [SLIDING, FULL],
         "rope_parameters": {SLIDING: rope(1e4), FULL: {"rope_type": "linear", "factor": 8.0,
                                                        "rope_theta": 1e6}}},
        fused=fused(2, 2, 2, 13, 2),
    ),
    "Qwen 1.5": Named("Qwen2", {"num_key_value_heads": 4}, fused=WHOLE),
    "Qwen 2, 2.5": Named("Qwen2", {"rope_parameters": rope(1e6)}, fused=WHOLE),
    "Qwen 2.5 0.5B": Named("Qwen2", {"tie_word_embeddings": True}, fused=WHOLE),
    "Qwen 2.5 with YaRN": Named("Qwen2", {"rope_parameters": YARN}, fused=WHOLE),
    "Qwen 3": Named("Qwen3", {"head_dim": 32, "rope_parameters": rope(1e6)}, fused=BEHIND),
    "Phi-2": Named(
        "Phi", {"num_key_value_heads": 4, "rope_parameters": rope(1e4, 0.5)},
        layers=0, fused=fused(0, 2, 2, 0, 2),
    ),
    "Phi-3 mini": Named("Phi3", {"num_key_value_heads": 4, "sliding_window": 8}, fused=WHOLE),
    "Phi-3 128k, 3.5": Named(
        "Phi3", {"num_key_value_heads": 4, "rope_parameters": longrope(16),
                 "original_max_position_embeddings": 16},
        fused=WHOLE,
    ),
    "Phi-4": Named("Phi3", {"rope_parameters": rope(2.5e5)}, fused=WHOLE),
    "Phi-4 mini": Named(
        "Phi3",
        {"tie_word_embeddings": True, "rope_parameters": longrope(16, 0.75),
         "original_max_position_embeddings": 16},
        fused=WHOLE,
    ),
    "Phi-3.5 MoE": Named(
        "Phimoe",
        {**MOE, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.0},
        layers=0, fused=fused(0, 2, 2, 0, 2), targets=EXPERTS,
    ),
    "DeepSeek-V2": Named("DeepseekV2", MLA, layers=0, fused=fused(2, 2, 2, 9, 0), targets=LATENT),
    "DeepSeek-V2 Lite": Named(
        "DeepseekV2", {**MLA, "q_lora_rank": None}, layers=0, fused=fused(2, 2, 2, 7, 0),
        targets=LATENT,
    ),
    "DeepSeek-V3": Named(
        "DeepseekV3", {**MLA, "routed_scaling_factor": 2.5}, layers=0, fused=fused(2, 2, 2, 9, 0),
        targets=LATENT,
    ),
    "Mixtral": Named("Mixtral", MOE, layers=0, fused=fused(0, 2, 2, 5, 2), targets=EXPERTS),
    "Qwen2-MoE": Named(
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "shared_expert_intermediate_size": 128, "num_key_value_heads": 4},
        layers=0, fused=fused(2, 2, 2, 5, 2), targets=EXPERTS + DENSE,
    ),
    "Qwen3-MoE": Named(
        "Qwen3Moe",
        {**MOE, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
        layers=0, fused=fused(0, 2, 2, 9, 2), targets=EXPERTS,
    ),
    "gpt-oss": Named(
        "GptOss",
        {**MOE, "head_dim": 32, "sliding_window": 8, "layer_types": [SLIDING, FULL],
         "rope_parameters": {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
        layers=0, fused={**fused(0, 2, 2, 5, 0), "moe": 2}, attention="eager", targets=EXPERTS,
        parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "Granite 3": Named("Granite", GRANITE, fused=WHOLE),
    "Command R": Named(
        "Cohere", {"num_key_value_heads": 4, "logit_scale": 0.0625}, layers=0,
        fused=fused(2, 2, 2, 0, 2),
    ),
    "Command R+": Named(
        "Cohere", {"use_qk_norm": True, "logit_scale": 0.8}, layers=0, fused=fused(2, 2, 2, 0, 0)
    ),
    "Command R7B, A (Cohere 2)": Named(
        "Cohere2",
        {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": [*[SLIDING] * 3, FULL]},
        layers=0, fused=fused(4, 4, 4, 0, 4),
    ),
    "OLMo 2": Named("Olmo2", {"num_key_value_heads": 4}, layers=0, fused=fused(2, 2, 2, 9, 0)),
    "OLMo 3": Named(
        "Olmo3",
        {"num_hidden_layers": 4, "num_key_value_heads": 4, "sliding_window": 8,
         "layer_types": [*[SLIDING] * 3, FULL],
         "rope_parameters": {SLIDING: rope(5e5), FULL: {**YARN, "rope_theta": 5e5}}},
        layers=0, fused=fused(4, 4, 4, 17, 0),
    ),
    "SmolLM3": Named(
        "SmolLM3",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True},
        layers=4, fused=fused(4, 4, 4, 9, 4),
    ),
    "GLM-4 (0414)": Named(
        "Glm4", {"head_dim": 32, "rope_parameters": rope(1e4, 0.5)}, fused=BEHIND
    ),
    "GLM-4 9B": Named(
        "Glm", {"head_dim": 32, "rope_parameters": rope(1e4, 0.5), "attention_bias": True},
        fused=WHOLE,
    ),
    "StableLM 2 1.6B": Named(
        "StableLm",
        {"num_key_value_heads": 4, "use_qkv_bias": True, "rope_parameters": rope(1e4, 0.25)},
        layers=0, fused=fused(2, 2, 2, 0, 2),
    ),
    "StableLM 2 12B": Named(
        "StableLm",
        {"qk_layernorm": True, "use_parallel_residual": True, "rope_parameters": rope(1e4, 0.25)},
        layers=0, fused=fused(2, 2, 2, 0, 0),
    ),
    "Falcon 7B": Named(
        "Falcon", {"ffn_hidden_size": 256, "multi_query": True, "parallel_attn": True}, layers=0,
        fused=fused(0, 2, 2, 0, 0),
    ),
    "Falcon 40B": Named(
        "Falcon",
        {"ffn_hidden_size": 256, "new_decoder_architecture": True, "num_kv_heads": 2}, layers=0,
        fused=fused(0, 2, 2, 0, 0),
    ),
}  # fmt: skip

Make = Callable[..., Any]
Run = Callable[..., dict[str, Tensor]]


@pytest.fixture
def make(make_peft: Make) -> Make:
    def build(name: str, dtype: torch.dtype = torch.float32, nf4: bool = False) -> Any:
        named = NAMED[name]
        if dtype != torch.float32:
            named = named.without_choice()
        return make_peft(
            named.build(), dtype, nf4, attention=named.attention, target_modules=named.targets,
            target_parameters=named.parameters,
        )  # fmt: skip

    return build


def check_fused(name: str, model: nn.Module, result: FusedModel) -> None:
    """What the table promises is fused, and was called."""
    named = NAMED[name]
    whole = sum(isinstance(m.__dict__.get("forward"), FusedDecoderLayer) for m in model.modules())
    assert whole == named.layers, result.notes
    called = {
        operation: sum(r.calls > 0 for r in result.records if r.operation == operation)
        for operation in named.fused
    }
    reasons = {f"{r.operation}: {r.reason}" for r in result.records if r.reason}
    assert called == named.fused, reasons
    stock = {r.operation: r.stock_calls for r in result.records if r.fused and r.stock_calls}
    assert not stock


@pytest.mark.parametrize("name", NAMED)
def test_in_fp32_every_gradient_and_20_steps_are_stocks(name, make, step, close, curve) -> None:
    model, other = make(name), make(name)
    stock = step(model)
    result = apply(other, ALL)
    close(step(other), stock)
    check_fused(name, other, result)
    curves = [curve(m, STEPS, RATE) for m in (model, other)]
    assert curves[0][0][0] - curves[0][-1][0] > 0.005, "it does not learn"
    for (loss, norm), (our_loss, our_norm) in zip(*curves, strict=True):
        assert abs(our_loss - loss) < 1e-4
        assert abs(our_norm / norm - 1) < 2e-3


def check_16_bit(name: str, nf4: bool, make: Make, step: Run, curve: Callable[..., Any]) -> None:
    model = make(name, torch.bfloat16, nf4)

    def fuse(ours: nn.Module) -> Callable[[], None]:
        result = apply(ours, ALL)
        return lambda: check_fused(name, ours, result)

    no_further_from_fp32_than_stock(model, fuse, step, curve)


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("name", NAMED)
def test_on_a_gpu_in_16_bit(name, nf4, make, step, curve) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    check_16_bit(name, nf4, make, step, curve)


@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize(
    "name", ["Llama 3.1, 3.3", "Phi-4 mini", "DeepSeek-V3", "gpt-oss", "Falcon 7B"]
)
def test_in_16_bit(name, nf4, make, step, curve) -> None:
    check_16_bit(name, nf4, make, step, curve)
