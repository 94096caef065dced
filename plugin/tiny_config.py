"""A tiny config of any of transformers' model types: few layers, heads and words, narrow rows.

It is made from the config class alone, by the names of its fields. All that decides what a block
computes (activation, norms, biases, kinds of layers, RoPE) stays at the class's defaults. A few
classes need sizes that agree with each other; `EXCEPTIONS` has theirs.
"""

from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

WORDS = 128
# Tokens of a batch are drawn below this; a default token id beyond the vocabulary is put above it.
TEXT_WORDS = 96
HIDDEN = 64

# Field name -> the most that it may be. Layers: enough for what differs from layer to layer.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), HIDDEN),
    **dict.fromkeys(("embedding_dim", "emb_dim", "word_embed_proj_dim", "lru_width"), HIDDEN),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), HIDDEN),
    **dict.fromkeys(("hidden_size_global", "backbone_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "dim_head", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "kv_channels", "attention_head_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), 16),
    **dict.fromkeys(("query_pre_attn_scalar", "swa_v_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    "qk_head_dim": 24,
    "index_head_dim": 16,
    "index_topk": 8,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner"), 128),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 128),
    **dict.fromkeys(("feed_forward_size", "dense_intermediate_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size"), 96),
    "moe_shared_expert_intermediate_size": 96,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "zero_expert_num": 2,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_d_ssm", "time_step_rank"), 16),
    **dict.fromkeys(("mamba_dt_rank", "router_hidden_size", "adapter_rank"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), 8),
    **dict.fromkeys(("attention_window_size", "local_attention", "attention_chunk_size"), 8),
    "moe_layer_end_index": 3,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    **dict.fromkeys(("image_size", "num_channels"), 32),
    "patch_size": 8,
    "depth": 2,
}  # fmt: skip

# Beside these, in a config that holds others: towers of vision, and what lies between the towers.
COMPOSITE_SIZES: dict[str, int] = {
    **dict.fromkeys(("embed_dim", "out_hidden_size", "text_hidden_size", "output_dim"), HIDDEN),
    **dict.fromkeys(("projection_dim", "projector_hidden_size", "projector_input_dim"), HIDDEN),
    **dict.fromkeys(("projector_output_dim", "encoder_hidden_size", "vision_output_dim"), HIDDEN),
    **dict.fromkeys(("image_token_embed_dim", "qformer_hidden_size"), HIDDEN),
    **dict.fromkeys(("mlp_dim", "d_ff", "projection_hidden_size"), 128),
    "projection_intermediate_size": 128,
    **dict.fromkeys(("layers", "vision_layers"), 2),
    **dict.fromkeys(("d_kv", "output_channels"), 16),
    **dict.fromkeys(("base_channels", "latent_channels"), 32),
    **dict.fromkeys(("resampler_head_dim", "resampler_n_heads"), 16),
    **dict.fromkeys(("latent_query_num", "num_query_tokens", "resampler_n_latents"), 4),
    **dict.fromkeys(("num_position_embeddings", "num_patches"), 64),
    **dict.fromkeys(("num_embeddings", "codebook_size", "linear_head_dim"), 16),
    "linear_num_heads": 4,
    **dict.fromkeys(("post_conv_in_channels", "post_conv_mid_channels"), 16),
    **dict.fromkeys(("post_conv_out_channels", "decoder_hidden_size"), HIDDEN),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width"), 8),
    **dict.fromkeys(("mm_tokens_per_image", "num_image_tokens", "image_seq_length"), 4),
    "window_size": 32,  # of pixels
    "num_global_layers": 1,
    "pooling_kernel_size": 2,
}  # fmt: skip
# Ends of the names of lists that say which layers of `num_hidden_layers` (or `depth`) are meant.
LAYER_LISTS = ("_layers", "_indices", "_indexes", "_idxs", "_idx")

# What the names do not tell: sizes of one class that must agree, in the class's own terms.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blip-2": {"image_token_index": 97},
    "blt": {"encoder_hash_byte_group_vocab": 64, "use_cache": False},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 97}
        | {f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 100 + i for i in range(16)},
        "image_token_id": 97,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "emu3_vqgan": {"hidden_size": 128},
    "emu3": {
        "vocabulary_map": {"<image>": 97, "<|extra_200|>": 98}
        | {f"<|visual token {i:06}|>": 100 + i for i in range(16)},
        "image_token_id": 97,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n_text": {"intermediate_size": [128] * 4},
    "glm5_next_text": {"index_kpool": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {  # as released: at the class's defaults it would be a Llama
        "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
    },
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        "deepstack_layer_map": [[1, 0], [2, 2]], "downsample_rate": "1/2",
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[32, 64], [64, 32]],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "instructblip": {"image_token_index": 97},
    "instructblipvideo": {"video_token_index": 97, "image_token_index": 97},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_k25": {"projection_hidden_size": 64},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 192},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "llama4_vision_model": {"intermediate_size": 256},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "minicpmv4_6": {"image_token_id": 97, "video_token_id": 98},
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "mllama_vision_model": {"intermediate_layers_indices": [1], "vision_output_dim": 128},
    "muse_glimmer": {"out_hidden_size": 256},
    "nemotron": {"num_key_value_heads": 2},
    "olmo": {"clip_qkv": 1.0},
    "olmoe": {"clip_qkv": 1.0},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "paddleocr_vl_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2],
        },
    },
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 125, "vision_end_token_id": 126},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 125, "vision_end_token_id": 126},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 5], "axial_pos_embds_dim": [32, 32]},
    "roc_bert": {
        "pronunciation_vocab_size": 32, "shape_vocab_size": 32,
        "pronunciation_embed_dim": 16, "shape_embed_dim": 16,
    },
    "step3p5": {"sliding_window": 8},
    "udop": {"decoder_start_token_id": 0},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2", "add_cross_attention": True},
        "decoder_start_token_id": 1, "pad_token_id": 2,
    },
    "xlstm": {"mode": "train", "chunk_size": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
}  # fmt: skip


def tiny_config(model_type: str, *, images: bool = False, **changes: Any) -> PretrainedConfig:
    """The tiny config of a model type.

    Args:
        model_type: transformers' key.
        images: with the vision tower that the config is without unless one is asked for.
        changes: fields as they are; of a config within it, a dict with its model_type and what is
            to differ from that type's tiny config.

    Raises:
        Exception: whatever the config class raises on sizes that it refuses.
    """
    config_class = transformers.CONFIG_MAPPING[model_type]
    given = EXCEPTIONS.get(model_type, {}) | changes
    within: dict[str, Any] = {
        name: transformers.CONFIG_MAPPING[value["model_type"]](**value).to_dict()
        for name, value in given.items()
        if isinstance(value, dict) and "model_type" in value
    }
    default = config_class(**within)
    sizes = SIZES
    if any(isinstance(value, PretrainedConfig) for value in vars(default).values()):
        sizes = SIZES | COMPOSITE_SIZES
    fields = _fields(default, sizes)
    if images and (tower := _left_out(default)) is not None:
        fields["vision_config"] = _fields(tower, sizes)
    for name, value in given.items():
        fields[name] = fields[name] | value if name in within else value
    return config_class(**fields)


def _fields(config: PretrainedConfig, sizes: dict[str, int]) -> dict[str, Any]:
    """The fields to give to the class, its sub-configs' as dicts."""
    fields: dict[str, Any] = {}
    vocabulary = min(getattr(config, "vocab_size", None) or WORDS, WORDS)
    special = TEXT_WORDS
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            fields[name] = {"model_type": value.model_type} | _fields(value, sizes)
            fields[name] |= EXCEPTIONS.get(value.model_type, {})
        elif isinstance(value, bool):
            continue
        elif name == "head_dim" and value is None:
            fields[name] = sizes[name]
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            fields[name] = 0.0  # stock and fused draw in the same order, but this is not the place
        elif isinstance(value, int) and name in sizes:
            fields[name] = min(value, sizes[name])
        elif isinstance(value, int) and name.endswith(("_id", "_index")) and value >= vocabulary:
            special += 1
            fields[name] = special
    if hasattr(config, "kv_lora_rank"):  # latent attention shares no heads and derives head_dim
        fields.pop("head_dim", None)
        if "num_key_value_heads" in fields:
            fields["num_key_value_heads"] = SIZES["num_attention_heads"]
    return fields | _layer_lists(config, fields) | _rope_sections(config, fields)


def _left_out(config: PretrainedConfig) -> PretrainedConfig | None:
    tower = getattr(type(config), "sub_configs", {}).get("vision_config")
    if tower in (None, AutoConfig) or getattr(config, "vision_config", None) is not None:
        return None
    return tower()  # type: ignore[no-any-return]


def _layer_lists(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Lists of layers' numbers without those that the tiny model lacks."""
    layers = fields.get("num_hidden_layers", fields.get("depth"))
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and name.endswith(LAYER_LISTS)
    }
    if layers is None:
        return {}
    return {
        name: [i for i in value if i < layers]
        for name, value in lists.items()
        if all(isinstance(i, int) for i in value) and len(set(value)) == len(value)
    }


def _rope_sections(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """RoPE's three axes (M-RoPE), where the class knows them, for the tiny heads."""
    rope = getattr(config, "rope_parameters", None)
    known = getattr(type(config), "ignore_keys_at_rope_validation", None) or ()
    if not isinstance(rope, dict) or "mrope_section" not in {*known, *rope}:
        return {}
    size = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    return {"rope_parameters": rope | {"mrope_section": [(half + 2 - i) // 3 for i in range(3)]}}
