"""Published models as `lorafuse bench` and `plan` name them: what their `config.json` says.

A geometry is a config without weights: speed and memory of a training step do not depend on the
weights' values. What a row leaves out is transformers' default for the class, which is the
published value. `family` is what the README's table of named families calls the model.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Geometry:
    """A published model.

    Attributes:
        source: Its repository on the Hugging Face Hub.
        kind: transformers' config class, without "Config".
        values: Of the config.
        family: The named family that it stands for; empty: none.
    """

    source: str
    kind: str
    values: Mapping[str, Any]
    family: str = ""

    def config(self) -> "PretrainedConfig":
        """A config of its own."""
        import transformers  # seconds, for which a command's help is not to wait

        values = deepcopy(dict(self.values))
        config: PretrainedConfig = getattr(transformers, f"{self.kind}Config")(**values)
        return config


def _sizes(
    layers: int, hidden: int, inner: int, heads: int, key_value: int, words: int, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": key_value, "vocab_size": words, **more,
    }  # fmt: skip


def _rope(theta: float, positions: int, **more: Any) -> dict[str, Any]:
    """Rotary embedding, and the positions that the model is made for."""
    return {
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **more},
    }


def _yarn(theta: float, positions: int, factor: float, original: int, **more: Any) -> Any:
    return _rope(
        theta, positions, rope_type="yarn", factor=factor, beta_fast=32.0, beta_slow=1.0,
        original_max_position_embeddings=original, **more,
    )  # fmt: skip


def _llama_3(layers: int, hidden: int, inner: int, heads: int, factor: float, **more: Any) -> Any:
    rope = _rope(
        5e5, 131072, rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    return _sizes(
        layers, hidden, inner, heads, 8, 128256, rms_norm_eps=1e-5, bos_token_id=128000,
        eos_token_id=128001, **rope, **more,
    )  # fmt: skip


def _mistral(sizes: dict[str, Any], theta: float, positions: int, **more: Any) -> dict[str, Any]:
    common = {"sliding_window": None, "rms_norm_eps": 1e-5}
    return sizes | common | _rope(theta, positions) | more


def _deepseek_v3(experts: int) -> dict[str, Any]:
    """Layers, widths and ways of choosing are the class's defaults."""
    rope = _yarn(1e4, 163840, 40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    return {"n_routed_experts": experts, **rope}


# microsoft/Phi-3.5-mini-instruct, `short_factor` and `long_factor` of its "longrope".
_PHI_SHORT = (
    1.0, 1.02, 1.03, 1.03, 1.05, 1.05, 1.05, 1.05, 1.05, 1.07, 1.1, 1.11, 1.16, 1.16, 1.17, 1.29,
    1.34, 1.68, 1.79, 1.82, 1.85, 1.88, 1.91, 1.94, 1.99, 2.02, 2.02, 2.02, 2.02, 2.02, 2.02, 2.03,
    2.03, 2.03, 2.03, 2.03, 2.03, 2.03, 2.03, 2.03, 2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84,
)  # fmt: skip
_PHI_LONG = (
    1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4, 7.7, 9.09, 12.2, 17.67,
    24.46, 28.57, 30.42, 30.84, 32.59, 32.93, 42.32, 44.96, 50.34, 50.45, 57.55, 57.93, 58.21,
    60.14, 62.61, 62.62, 62.71, 63.14, 63.14, 63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08,
    64.12, 64.41, 64.48, 64.51, 64.53, 64.84,
)  # fmt: skip

GEOMETRIES: dict[str, Geometry] = {
    "llama-3.1-8b": Geometry(
        "meta-llama/Llama-3.1-8B", "Llama", _llama_3(32, 4096, 14336, 32, 8.0), "Llama 3.1 8B"
    ),
    "llama-3.1-70b": Geometry(
        "meta-llama/Llama-3.1-70B", "Llama", _llama_3(80, 8192, 28672, 64, 8.0)
    ),
    "llama-3.2-1b": Geometry(
        "meta-llama/Llama-3.2-1B", "Llama",
        _llama_3(16, 2048, 8192, 32, 32.0, tie_word_embeddings=True),
    ),
    "llama-2-7b": Geometry(
        "meta-llama/Llama-2-7b-hf", "Llama",
        _sizes(32, 4096, 11008, 32, 32, 32000, rms_norm_eps=1e-5, **_rope(1e4, 4096)),
        "Llama 2 7B",
    ),
    "mistral-7b": Geometry(
        "mistralai/Mistral-7B-v0.3", "Mistral",
        _mistral(_sizes(32, 4096, 14336, 32, 8, 32768), 1e6, 32768), "Mistral 7B v0.3",
    ),
    "mistral-nemo-12b": Geometry(
        "mistralai/Mistral-Nemo-Base-2407", "Mistral",
        _mistral(_sizes(40, 5120, 14336, 32, 8, 131072), 1e6, 128000, head_dim=128),
        "Mistral Nemo 12B",
    ),
    "mistral-large": Geometry(
        "mistralai/Mistral-Large-Instruct-2407", "Mistral",
        _mistral(_sizes(88, 12288, 28672, 96, 8, 32768), 1e6, 131072, head_dim=128),
        "Mistral Large 123B",
    ),
    "ministral-8b": Geometry(  # published as "mistral", before transformers had its windows
        "mistralai/Ministral-8B-Instruct-2410", "Ministral",
        _mistral(_sizes(36, 4096, 12288, 32, 8, 131072), 1e8, 32768, head_dim=128,
                 sliding_window=32768, layer_types=[FULL, *[SLIDING] * 3] * 9),
        "Ministral 8B",
    ),
    "gemma-7b": Geometry(
        "google/gemma-7b", "Gemma",
        _sizes(28, 3072, 24576, 16, 16, 256000, head_dim=256, **_rope(1e4, 8192)), "Gemma 7B",
    ),
    "gemma-2-9b": Geometry(
        "google/gemma-2-9b", "Gemma2",
        _sizes(42, 3584, 14336, 16, 8, 256000, head_dim=256, query_pre_attn_scalar=256,
               sliding_window=4096, max_position_embeddings=8192),
        "Gemma 2 9B",
    ),
    "gemma-3-12b": Geometry(  # its text tower
        "google/gemma-3-12b-pt", "Gemma3Text",
        _sizes(48, 3840, 15360, 16, 8, 262208, head_dim=256, query_pre_attn_scalar=256,
               sliding_window=1024, max_position_embeddings=131072,
               rope_parameters={
                   SLIDING: {"rope_type": "default", "rope_theta": 1e4},
                   FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
               }),
        "Gemma 3 12B (text)",
    ),
    "qwen1.5-7b": Geometry(
        "Qwen/Qwen1.5-7B", "Qwen2",
        _sizes(32, 4096, 11008, 32, 32, 151936, **_rope(1e6, 32768)), "Qwen1.5 7B",
    ),
    "qwen2.5-7b": Geometry(
        "Qwen/Qwen2.5-7B", "Qwen2",
        _sizes(28, 3584, 18944, 28, 4, 152064, **_rope(1e6, 131072)), "Qwen2.5 7B",
    ),
    "qwen3-8b": Geometry(
        "Qwen/Qwen3-8B", "Qwen3",
        _sizes(36, 4096, 12288, 32, 8, 151936, head_dim=128, **_rope(1e6, 40960)), "Qwen3 8B",
    ),
    "phi-2": Geometry(
        "microsoft/phi-2", "Phi",
        _sizes(32, 2560, 10240, 32, 32, 51200, **_rope(1e4, 2048, partial_rotary_factor=0.4)),
        "Phi-2",
    ),
    "phi-3.5-mini": Geometry(
        "microsoft/Phi-3.5-mini-instruct", "Phi3",
        _sizes(32, 3072, 8192, 32, 32, 32064, sliding_window=262144,
               original_max_position_embeddings=4096,
               **_rope(1e4, 131072, rope_type="longrope", short_factor=[*_PHI_SHORT],
                       long_factor=[*_PHI_LONG], original_max_position_embeddings=4096)),
        "Phi-3.5 mini",
    ),
    "phi-4": Geometry(
        "microsoft/phi-4", "Phi3",
        _sizes(40, 5120, 17920, 40, 10, 100352, **_rope(2.5e5, 16384)), "Phi-4",
    ),
    "deepseek-v2-lite": Geometry(
        "deepseek-ai/DeepSeek-V2-Lite", "DeepseekV2",
        _sizes(27, 2048, 10944, 16, 16, 102400, moe_intermediate_size=1408, n_routed_experts=64,
               n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, kv_lora_rank=512,
               q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
               n_group=1, topk_group=1,
               **_yarn(1e4, 163840, 40.0, 4096, mscale=0.707, mscale_all_dim=0.707)),
        "DeepSeek-V2 Lite",
    ),
    "deepseek-v3": Geometry("deepseek-ai/DeepSeek-V3", "DeepseekV3", _deepseek_v3(256)),
    "deepseek-v3-64-experts": Geometry(  # a layer of all 256 takes 23 GB in bf16
        "deepseek-ai/DeepSeek-V3", "DeepseekV3", _deepseek_v3(64), "DeepSeek-V3, 64 of 256 experts"
    ),
    "mixtral-8x7b": Geometry(
        "mistralai/Mixtral-8x7B-v0.1", "Mixtral",
        _mistral(_sizes(32, 4096, 14336, 32, 8, 32000), 1e6, 32768, num_local_experts=8,
                 num_experts_per_tok=2),
        "Mixtral 8x7B",
    ),
    "mixtral-8x22b": Geometry(
        "mistralai/Mixtral-8x22B-v0.1", "Mixtral",
        _mistral(_sizes(56, 6144, 16384, 48, 8, 32000), 1e6, 65536, num_local_experts=8,
                 num_experts_per_tok=2),
        "Mixtral 8x22B",
    ),
    "qwen2-57b-a14b": Geometry(
        "Qwen/Qwen2-57B-A14B", "Qwen2Moe",
        _sizes(28, 3584, 18944, 28, 4, 151936, num_experts=64, num_experts_per_tok=8,
               moe_intermediate_size=2560, shared_expert_intermediate_size=20480,
               **_rope(1e6, 131072)),
        "Qwen2-MoE 57B-A14B",
    ),
    "qwen3-30b-a3b": Geometry(
        "Qwen/Qwen3-30B-A3B", "Qwen3Moe",
        _sizes(48, 2048, 6144, 32, 4, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
               moe_intermediate_size=768, norm_topk_prob=True, **_rope(1e6, 40960)),
        "Qwen3 30B-A3B",
    ),
    "gpt-oss-20b": Geometry(
        "openai/gpt-oss-20b", "GptOss",
        _sizes(24, 2880, 2880, 64, 8, 201088, head_dim=64, num_local_experts=32,
               num_experts_per_tok=4, sliding_window=128,
               **_yarn(1.5e5, 131072, 32.0, 4096, truncate=False)),
        "gpt-oss 20B",
    ),
    "granite-3.1-8b": Geometry(
        "ibm-granite/granite-3.1-8b-base", "Granite",
        _sizes(40, 4096, 12800, 32, 8, 49155, rms_norm_eps=1e-5, embedding_multiplier=12.0,
               residual_multiplier=0.22, attention_multiplier=0.0078125, logits_scaling=16.0,
               tie_word_embeddings=True, **_rope(1e7, 131072)),
        "Granite 3.1 8B",
    ),
    "command-r7b": Geometry(
        "CohereLabs/c4ai-command-r7b-12-2024", "Cohere2",
        _sizes(32, 4096, 14336, 32, 8, 256000, logit_scale=0.25, **_rope(5e4, 132096)),
        "Command R7B",
    ),
    "olmo-2-7b": Geometry(
        "allenai/OLMo-2-1124-7B", "Olmo2",
        _sizes(32, 4096, 11008, 32, 32, 100352, rms_norm_eps=1e-6, **_rope(5e5, 4096)),
        "OLMo 2 7B",
    ),
    "olmo-3-7b": Geometry(  # YaRN on the full layers alone
        "allenai/Olmo-3-1025-7B", "Olmo3",
        _sizes(32, 4096, 11008, 32, 32, 100278, rms_norm_eps=1e-6, max_position_embeddings=65536,
               rope_parameters={
                   SLIDING: {"rope_type": "default", "rope_theta": 5e5},
                   FULL: _yarn(5e5, 65536, 8.0, 8192, attention_factor=1.2079441541679836)[
                       "rope_parameters"
                   ],
               }),
        "OLMo 3 7B",
    ),
    "smollm3-3b": Geometry(
        "HuggingFaceTB/SmolLM3-3B", "SmolLM3",
        _sizes(36, 2048, 11008, 16, 4, 128256, **_rope(5e6, 65536)), "SmolLM3 3B",
    ),
    "glm-4-9b": Geometry(
        "zai-org/GLM-4-9B-0414", "Glm4",
        _sizes(40, 4096, 13696, 32, 2, 151552, head_dim=128, rms_norm_eps=1e-5,
               **_rope(1e4, 32768, partial_rotary_factor=0.5)),
        "GLM-4 9B (0414)",
    ),
    "stablelm-2-12b": Geometry(
        "stabilityai/stablelm-2-12b", "StableLm",
        _sizes(40, 5120, 13824, 32, 8, 100352, qk_layernorm=True, use_parallel_residual=True,
               **_rope(1e4, 4096, partial_rotary_factor=0.25)),
        "StableLM 2 12B",
    ),
    "falcon-7b": Geometry("tiiuae/falcon-7b", "Falcon", {}, "Falcon 7B"),
    "smollm2-135m": Geometry(
        "HuggingFaceTB/SmolLM2-135M", "Llama",
        _sizes(30, 576, 1536, 9, 3, 49152, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0,
               tie_word_embeddings=True, **_rope(1e5, 8192)),
    ),
    "tiny": Geometry("ours: a second on a CPU", "Llama", _sizes(2, 128, 256, 4, 2, 512)),
}  # fmt: skip

# Stands for all geometries that have a family.
NAMED_FAMILIES = "named-families"
