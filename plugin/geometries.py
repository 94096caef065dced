"""Which model `lorafuse bench` trains: a published geometry by name, or a model's folder.

A geometry is a config without weights: speed and memory of a training step do not depend on the
weights' values. The numbers are those of the `config.json` that each model was published with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.sketch import load_config


def _llama_3(rope_factor: float, **sizes: int | bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **sizes,  # type: ignore[arg-type]  # one type for all keywords of a long list
    )


GEOMETRIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-3.1-8b": lambda: _llama_3(  # meta-llama/Llama-3.1-8B
        8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "llama-3.1-70b": lambda: _llama_3(  # meta-llama/Llama-3.1-70B
        8.0,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "llama-3.2-1b": lambda: _llama_3(  # meta-llama/Llama-3.2-1B
        32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": lambda: Qwen3Config(  # Qwen/Qwen3-8B
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "mistral-7b": lambda: MistralConfig(  # mistralai/Mistral-7B-v0.3
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        sliding_window=None,
    ),
    "gemma-2-9b": lambda: Gemma2Config(  # google/gemma-2-9b
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        max_position_embeddings=8192,
    ),
    "smollm2-135m": lambda: LlamaConfig(  # HuggingFaceTB/SmolLM2-135M
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    ),
    "tiny": lambda: LlamaConfig(  # ours: a second on a CPU
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


@dataclass(frozen=True)
class Model:
    """What is to be trained.

    Attributes:
        name: The geometry, or the folder.
        config: The model's config, cut to the layers that were asked for.
        weights: The folder that weights are loaded from; None: random ones.
    """

    name: str
    config: PretrainedConfig
    weights: Path | None


def find_model(name: str, layers: int | None = None) -> Model:
    """A geometry by its name, or the model in a folder.

    Args:
        name: One of `GEOMETRIES`, or a folder with a `config.json`. Without weights beside it,
            they are random ones.
        layers: Keep only the first ones.

    Raises:
        FuseConfigError: There is no such model, or it has fewer layers.
    """
    if name in GEOMETRIES:
        model = Model(name, GEOMETRIES[name](), None)
    elif (folder := Path(name)).is_dir():
        held = any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
        model = Model(name, load_config({"base_model": name}), folder if held else None)
    else:
        near = get_close_matches(name, GEOMETRIES, n=1, cutoff=0.5)
        meant = f"did you mean `{near[0]}`? " if near else ""
        raise FuseConfigError(
            f"--model {name} is neither a geometry nor a folder; {meant}the geometries are "
            f"{', '.join(GEOMETRIES)}; or give the folder of a model, which at least holds a "
            "config.json"
        )
    if layers is not None:
        keep_layers(model.config, layers)
    return model


def keep_layers(config: PretrainedConfig, layers: int) -> None:
    """Cuts the config to its first layers, with the lists that say something of each layer."""
    text = config.get_text_config()
    whole = text.num_hidden_layers
    if not 1 <= layers <= whole:
        raise FuseConfigError(f"--layers {layers}: the model has {whole}; give 1 to {whole}")
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
