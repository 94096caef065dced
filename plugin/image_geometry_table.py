"""Published models of images and text as `lorafuse bench` names them, beside `geometry_table`'s.

Each holds the configs of two towers; a text tower that is a geometry of its own, or differs from
one in a few values, is taken from there. What a row leaves out is transformers' default for the
class, which is the published value.
"""

from typing import Any

from lorafuse.plugin.geometry_table import GEOMETRIES, Geometry

# Stands for all of these geometries.
NAMED_IMAGE_FAMILIES = "named-image-families"


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def _text(geometry: str, **changes: Any) -> dict[str, Any]:
    return {**GEOMETRIES[geometry].values, **changes}


def _qwen(positions: int) -> dict[str, Any]:
    rope = _rope(1e6, mrope_section=[16, 24, 24])
    return _text("qwen2.5-7b", max_position_embeddings=positions, rms_norm_eps=1e-6, **rope)


IMAGE_GEOMETRIES: dict[str, Geometry] = {
    "llama-3.2-11b-vision": Geometry(  # Llama 3.1 8B with eight more layers, which see the image
        "meta-llama/Llama-3.2-11B-Vision-Instruct", "Mllama",
        {
            "text_config": _text("llama-3.1-8b", num_hidden_layers=40),
            "vision_config": {"image_size": 560},
        },
        "Llama 3.2 11B Vision",
    ),
    "qwen2-vl-7b": Geometry(
        "Qwen/Qwen2-VL-7B-Instruct", "Qwen2VL", {"text_config": _qwen(32768)}, "Qwen2-VL 7B"
    ),
    "qwen2.5-vl-7b": Geometry(
        "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2_5_VL",
        {
            "text_config": _qwen(128000),
            "vision_config": {"hidden_size": 1280, "tokens_per_second": 2},
        },
        "Qwen2.5-VL 7B",
    ),
    "pixtral-12b": Geometry(
        "mistral-community/pixtral-12b", "Llava",
        {
            "text_config": _text("mistral-nemo-12b", model_type="mistral",
                                 max_position_embeddings=1024000, **_rope(1e9)),
            "vision_config": {"model_type": "pixtral", "hidden_act": "silu", **_rope(1e4)},
            "image_token_index": 10, "image_seq_length": 1, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "Pixtral 12B",
    ),
    "gemma-3-12b-vision": Geometry(
        "google/gemma-3-12b-pt", "Gemma3",
        {
            "text_config": _text("gemma-3-12b"),
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
                "vision_use_head": False,
            },
        },
        "Gemma 3 12B",
    ),
}  # fmt: skip
