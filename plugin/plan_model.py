"""The shapes of a model that `lorafuse plan` needs, read off the model without weights.

The model is built on the meta device from its config, and its decoder layers are recognised as
fusing does it, by structure. So there is no list of architectures here either, and parameters are
counted, not computed from a formula.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorafuse.patches.host_memory import holders
from lorafuse.patches.structure import DecoderLayer, in_out, recognise_decoder_layer
from lorafuse.plugin.errors import FuseConfigError

_AUTO: Any = AutoModelForCausalLM


@dataclass(frozen=True)
class Linear:
    """A linear layer's weight [out_features, in_features], and whether it has a bias."""

    name: str  # qualified, as in the model
    in_features: int
    out_features: int
    bias: bool

    @property
    def elements(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class LayerShape:
    """A pre-norm decoder layer.

    Attributes:
        qkv: q, k and v, or one projection of all three.
        o: the attention's output projection.
        gate_up: gate and up, or one projection of both.
        down: the MLP's output projection.
        query_heads, key_value_heads, head_size: of the attention.
        head_norms: norms on q's and k's heads (Qwen3).
        post_norms: norms behind both blocks (Gemma 2).
        scaled: both blocks' outputs are scaled before they are added (Granite).
        window: of sliding attention, in tokens; None: full attention.
    """

    qkv: tuple[Linear, ...]
    o: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    query_heads: int
    key_value_heads: int
    head_size: int
    head_norms: bool = False
    post_norms: bool = False
    scaled: bool = False
    window: int | None = None

    @property
    def adds_apart(self) -> bool:
        """Whether the residual is added outside of the block's last product."""
        return self.post_norms or self.scaled

    @property
    def hidden(self) -> int:
        return self.qkv[0].in_features

    @property
    def intermediate(self) -> int:
        return self.down.in_features

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.qkv, self.o, *self.gate_up, self.down)


@dataclass(frozen=True)
class ModelShape:
    """A causal LM.

    Attributes:
        name: for people.
        layers: the decoder layers, first to last.
        hidden, vocabulary: of the head [vocabulary, hidden].
        parameters: all of them, a tied head counted once.
        longest: positions that the model was made for; 0: it does not say.
        embeddings: elements of an input embedding that is no head as well; 0: there is none.
        eager: the installed transformers has no attention for the class but the eager one.
    """

    name: str
    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    parameters: int
    longest: int = 0
    embeddings: int = 0
    eager: bool = False

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of all decoder layers: what a quantisation quantises and `all-linear` adapts."""
        return tuple(linear for layer in self.layers for linear in layer.linears)


def model_shape(name: str, config: PretrainedConfig, trust_remote_code: bool = False) -> ModelShape:
    """The shapes of the causal LM of `config`; nothing is allocated.

    Raises:
        FuseConfigError: transformers has no causal LM for the config, or its decoder layers are
            of a form that is not predicted.
    """
    config = type(config).from_dict(config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            model: Any = _AUTO.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise FuseConfigError(
            f"transformers builds no causal LM from the config of {name} "
            f"({type(config).__name__}): {error}; `lorafuse plan` is for those"
        ) from error
    model.tie_weights()
    text = config.get_text_config()
    head = model.get_output_embeddings()
    return ModelShape(
        name=name,
        layers=tuple(_layer(qualified, layer, name) for qualified, layer in _stack(model, text)),
        hidden=int(head.in_features),
        vocabulary=int(head.out_features),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        longest=int(getattr(text, "max_position_embeddings", 0) or 0),
        embeddings=_separate_embeddings(model),
        eager=not getattr(model, "_supports_sdpa", True),
    )


def _separate_embeddings(model: Any) -> int:
    """Elements of the input embeddings' table, 0 where the head or another module shares it."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    return int(table.numel()) if table is not None and holders(model, table) == 1 else 0


def _stack(model: nn.Module, text: PretrainedConfig) -> list[tuple[str, nn.Module]]:
    """The decoder layers with their qualified names."""
    layers = getattr(text, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
    raise FuseConfigError(
        f"{type(model).__name__} has no list of its {layers} decoder layers; `lorafuse plan` "
        "predicts models that have one"
    )


def _layer(qualified: str, module: nn.Module, model: str) -> LayerShape:
    found = recognise_decoder_layer(module)
    if found is None:
        raise FuseConfigError(
            f"{qualified} of {model} is a {type(module).__name__}, which is not fused as a whole, "
            "and `lorafuse plan` predicts only layers that are: norms in front, attention with q, "
            "k, v and o projections, a gated MLP (Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, "
            "Phi-3 and others of this form); `lorafuse doctor` says what is fused of this model"
        )
    names = {id(child): f"{qualified}.{name}" for name, child in module.named_modules()}
    return _shape(found, names)


def _shape(layer: DecoderLayer, names: dict[int, str]) -> LayerShape:
    def linear(module: nn.Module) -> Linear:
        K, N = in_out(module)
        return Linear(names[id(module)], K, N, getattr(module, "bias", None) is not None)

    attention, mlp = layer.attention, layer.mlp
    window = getattr(attention.module, "sliding_window", None)
    return LayerShape(
        qkv=tuple(linear(one) for one in attention.qkv),
        o=linear(attention.o),
        gate_up=tuple(linear(one) for one in mlp.gate_up),
        down=linear(mlp.down),
        query_heads=attention.query_heads,
        key_value_heads=attention.key_value_heads,
        head_size=attention.head_size,
        head_norms=attention.q_norm is not None and attention.k_norm is not None,
        post_norms=layer.mlp_post_norm is not None,
        scaled=layer.residual_scale != 1.0,
        window=window if isinstance(window, int) else None,
    )
