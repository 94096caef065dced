"""Recognises a block by what it holds, never by its class name.

A recogniser is a function `(module) -> description | None`. What it returns is a proposal: which
child plays which role, in the order of likelihood where several readings are possible. `verify.py`
then computes with it, and only a reading that reproduces the stock numbers is used.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lorafuse.kernels.clamped_swiglu import ClampedSwiglu
from lorafuse.kernels.clamped_swiglu import reference as clamped_swiglu
from lorafuse.kernels.moe import Activation
from lorafuse.kernels.rms_norm import reference as rms_norm

NO_GATED_MLP = "no gated MLP (gate, up and down projections with an activation)"
NO_ATTENTION = "no attention with q, k and v projections"
NO_OUTPUT_PROJECTION = "no o projection beside q, k and v"
NO_EXPERTS = "no experts (one weight [E, 2I, H] for gate and up, one [E, H, I] for down)"
NO_RMS_NORM = "no RMS norm (one weight and an epsilon)"


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """One weight and an epsilon: y = x / rms(x) * (offset + weight).

    With `round_normalised`, x / rms(x) is rounded to x's dtype before the product.
    """

    module: nn.Module
    eps: float
    offset: float
    round_normalised: bool = False

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class GatedMlp:
    """down(act(gate(x)) * up(x)); gate and up may be one projection."""

    module: nn.Module
    gate_up: tuple[nn.Module, ...]
    down: nn.Module
    activation: str


@dataclass(frozen=True, eq=False)
class Projections:
    """The projections of one input (q, k and v, or one of all three), and o where it stands there.

    Whatever lies between. Of latent attention (DeepSeek) it is the projections down, of q and of
    k with v.
    """

    module: nn.Module
    qkv: tuple[nn.Module, ...]
    o: nn.Module | None


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(rope(q) rope(k)^T) v with its projections, and norms on q's and k's heads or none."""

    module: nn.Module
    qkv: tuple[nn.Module, ...]
    o: nn.Module
    head_size: int
    query_heads: int
    key_value_heads: int
    q_norm: RmsNorm | None = None
    k_norm: RmsNorm | None = None


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """h2 = h + s [norm](attention(norm(h))); h3 = h2 + s [norm](mlp(norm(h2))).

    The norms in brackets stand behind the block in Gemma 2 and 3, and are None elsewhere; s, the
    `residual_scale`, is 1 but in Granite.
    """

    module: nn.Module
    attention: Attention
    mlp: GatedMlp
    attention_norm: RmsNorm
    mlp_norm: RmsNorm
    attention_post_norm: RmsNorm | None = None
    mlp_post_norm: RmsNorm | None = None
    dropouts: tuple[nn.Dropout, ...] = field(default=())
    residual_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of a mixture, kept as one weight [E, 2I, H] and one [E, H, I].

    Or as [E, H, 2I] and [E, I, H]; with a bias of each, [E, 2I] and [E, H], or without. Called with
    hidden states [T, H], the router's choice and its weights, both [T, k].

    Attributes:
        module: what is called: the experts, or the outermost of PEFT's wrappers around them.
        base: the module that holds the weights.
        gate_up: the name of the weight of gate and up.
        down: the name of the weight of down.
        activation: as in `GatedMlp`, or a clamped one.
        problem: what makes them other experts than that; "" where nothing does.
        transposed: the weights are [E, H, 2I] and [E, I, H].
    """

    module: nn.Module
    base: nn.Module
    gate_up: str = ""
    down: str = ""
    activation: Activation = ""
    problem: str = ""
    transposed: bool = False


Description = RmsNorm | GatedMlp | Projections | Attention | DecoderLayer | Experts
Recogniser = Callable[[nn.Module], Any]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# Where the declaration order does not tell gate from up; shapes tell the rest.
_GATE_UP = (
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("gate", "up"),
    ("linear", "linear_v"),
    ("wi_0", "wi_1"),
)
# Where experts or their config say what their gate's sigmoid and clamp are; values tell the rest.
_ALPHA = ("alpha", "swiglu_alpha")
_LIMIT = ("limit", "swiglu_limit")
_ACTIVATION = ("act_fn", "activation_fn", "act", "activation", "hidden_act", "nonlinearity")
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
)
_FUSED_QKV = ("qkv_proj", "query_key_value", "qkv", "Wqkv", "wqkv")
_O = ("o_proj", "out_proj", "dense", "wo", "Wo", "output", "proj", "projection")
_Q_NORM = ("q_norm", "query_norm", "q_layernorm")
_K_NORM = ("k_norm", "key_norm", "k_layernorm")


def drops_out(module: nn.Module, known: object = None) -> bool:
    """Whether a dropout of the block's own (not `known`) draws a mask in this call."""
    return module.training and any(
        isinstance(child, nn.Dropout) and child.p > 0 and child is not known
        for child in module.children()
    )


def is_linear(module: object) -> bool:
    """A linear layer of any format, adapted or not: it has in_features and out_features."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return isinstance(module, nn.Module) and all(
        isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")
    )


def in_out(module: nn.Module) -> tuple[int, int]:
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return int(base.in_features), int(base.out_features)


def _named(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    for name in names:
        child = module._modules.get(name)
        if child is not None and is_linear(child):
            return child
    return None


def _all_named(module: nn.Module, sets: Sequence[Sequence[str]]) -> tuple[nn.Module, ...] | None:
    for names in sets:
        children = [module._modules.get(name) for name in names]
        if all(is_linear(child) for child in children):
            return tuple(child for child in children if child is not None)
    return None


def recognise_activation(function: object) -> str | None:
    """Which activation `function` computes, found by its values and not by its name."""
    if not callable(function):
        return None
    x = torch.linspace(-8, 8, 257)
    try:
        with torch.no_grad():
            y = function(x)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name, activation in _ACTIVATIONS.items():
        if torch.allclose(y, activation(x), rtol=1e-5, atol=1e-6):
            return name
    return None


def recognise_rms_norm(module: nn.Module) -> RmsNorm | None:
    """One 1-D parameter named weight, no children, an epsilon; its output tells the offset."""
    if next(module.children(), None) is not None:
        return None
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return None
    eps = next(
        (
            float(value)
            for name in ("variance_epsilon", "eps", "epsilon", "variance_eps")
            if isinstance(value := getattr(module, name, None), int | float)
        ),
        None,
    )
    if eps is None or getattr(module, "bias", None) is not None:
        return None
    variant = _norm_variant(module, parameters["weight"], eps)
    return None if variant is None else RmsNorm(module, eps, *variant)


def _norm_variant(module: nn.Module, weight: nn.Parameter, eps: float) -> tuple[float, bool] | None:
    """(offset 0 or 1, round_normalised) that reproduce the module; None where nothing does.

    The offset is told by its fp32 output on three random rows, the rounding by its bf16 output. It
    is tried on a stand-in of the same class with random weights on the CPU, so that it costs
    nothing on a GPU and works for a model on the meta device.
    """
    stand_in = type(module).__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(4, weight.shape[0], generator=generator)
        w, x = rows[0], rows[1:]
        stand_in._parameters = {"weight": nn.Parameter(w, requires_grad=False)}
        stand_in.__dict__.pop("forward", None)
        try:
            y = type(module).forward(stand_in, x)
        except Exception:  # somebody else's forward may raise anything; then it is not an RMS norm
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            if torch.allclose(y.float(), normed * (w + offset), rtol=1e-4, atol=1e-5):
                break
        else:
            return None
        low_w, low_x = w.bfloat16(), x.bfloat16()
        stand_in._parameters = {"weight": nn.Parameter(low_w, requires_grad=False)}
        try:
            low_y = type(module).forward(stand_in, low_x)
        except Exception:  # as above; a norm that only takes fp32 rounds nothing
            return offset, False
        distances = [
            (low_y - rms_norm(low_x, low_w, eps, offset, round_normalised=rounded)).abs().sum()
            for rounded in (False, True)
        ]
        return offset, bool(distances[1] < distances[0])


def recognise_gated_mlp(module: nn.Module) -> GatedMlp | None:
    """Two projections up (or one that is twice as wide), one down, and an activation."""
    roles = _gate_up_down(module)
    if roles is None or _holds_more(module):
        return None
    others = [getattr(module, name, None) for name in _ACTIVATION]
    others = [ACT2FN.get(f) if isinstance(f, str) else f for f in others]
    activation = next((name for f in others if (name := recognise_activation(f))), None)
    if activation is None:
        # Named in the forward's code alone. SiLU is the usual one; verification has the last word.
        if any(callable(f) for f in others) or not _takes_one_input(module):
            return None
        activation = "silu"
    return GatedMlp(module, *roles, activation)


def _gate_up_down(module: nn.Module) -> tuple[tuple[nn.Module, ...], nn.Module] | None:
    """(gate and up, or the one of both; down) by their shapes: [I, H] twice or [2I, H], [H, I]."""
    linears = {name: child for name, child in module.named_children() if is_linear(child)}
    if len(linears) == 2:
        up, down = linears.values()
        (hidden, wide), (inner, out) = in_out(up), in_out(down)
        return ((up,), down) if wide == 2 * inner and out == hidden else None
    if len(linears) != 3:
        return None
    pair = next((names for names in _GATE_UP if set(names) <= set(linears)), None)
    if pair is None:
        shapes = [in_out(linear) for linear in linears.values()]
        same = [n for n, shape in zip(linears, shapes, strict=True) if shapes.count(shape) == 2]
        if len(same) != 2:
            return None
        pair = (same[0], same[1])
    gate, up = (linears.pop(name) for name in pair)
    (down,) = linears.values()
    if in_out(gate) != in_out(up) or in_out(gate) != in_out(down)[::-1]:
        return None
    return (gate, up), down


def _holds_more(module: nn.Module) -> bool:
    """Whether there are parameters besides the linear layers', as a Mamba mixer has."""
    rest = (child for child in module.children() if not is_linear(child))
    own = next(module.parameters(recurse=False), None)
    return own is not None or any(True for child in rest for _ in child.parameters())


def _takes_one_input(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # and self


def recognise_projections(module: nn.Module) -> Projections | None:
    """q, k and v as direct children, and o where it is one, too."""
    qkv = _all_named(module, _QKV)
    if qkv is None:
        one = _named(module, _FUSED_QKV)
        qkv = None if one is None else (one,)
    if qkv is None or len({in_out(linear)[0] for linear in qkv}) != 1:
        return None
    return Projections(module, qkv, _named(module, _O))


def recognise_attention(module: nn.Module) -> Attention | None:
    """Projections, a head size, and no other parameters but those of norms on q's and k's heads."""
    projections = recognise_projections(module)
    size = getattr(module, "head_dim", None)
    if projections is None or not isinstance(size, int) or size <= 0:
        return None
    if projections.o is None:
        return None
    if not isinstance(getattr(module, "scaling", None), int | float):
        return None
    total = sum(in_out(linear)[1] for linear in projections.qkv)
    query = in_out(projections.o)[0]
    if query % size or (total - query) % (2 * size) or total <= query:
        return None
    norms: list[RmsNorm | None] = []
    for names in (_Q_NORM, _K_NORM):
        child = next((module._modules[n] for n in names if module._modules.get(n)), None)
        norm = None if child is None else recognise_rms_norm(child)
        if child is not None and (norm is None or norm.weight.numel() != size):
            return None
        norms.append(norm)
    known = {id(m) for m in (*projections.qkv, projections.o)}
    known |= {id(norm.module) for norm in norms if norm is not None}
    if any(id(c) not in known and any(True for _ in c.parameters()) for c in module.children()):
        return None
    if next(module.parameters(recurse=False), None) is not None:
        return None
    heads = query // size, (total - query) // (2 * size)
    return Attention(module, projections.qkv, projections.o, size, *heads, *norms)


def _residual_scale(layer: nn.Module) -> float:
    """What the blocks' outputs are multiplied by; read by its name, proven like the rest."""
    value = getattr(layer, "residual_multiplier", 1.0)
    return float(value) if isinstance(value, int | float) else 1.0


def recognise_decoder_layer(module: nn.Module) -> DecoderLayer | None:
    """One attention, one gated MLP, and two norms in front of them (and two behind, or none)."""
    attention: Attention | None = None
    mlp: GatedMlp | None = None
    norms: list[RmsNorm] = []
    dropouts: list[nn.Dropout] = []
    for child in module.children():
        if isinstance(child, nn.Dropout):
            dropouts.append(child)
        elif (norm := recognise_rms_norm(child)) is not None:
            norms.append(norm)
        elif attention is None and (found := recognise_attention(child)) is not None:
            attention = found
        elif mlp is None and (block := recognise_gated_mlp(child)) is not None:
            mlp = block
        elif not isinstance(child, nn.Identity):
            return None
    if attention is None or mlp is None or len(norms) not in (2, 4):
        return None
    if next(module.parameters(recurse=False), None) is not None:
        return None
    if len(norms) == 2:
        return DecoderLayer(
            module, attention, mlp, norms[0], norms[1],
            dropouts=tuple(dropouts), residual_scale=_residual_scale(module),
        )  # fmt: skip
    before, after, before_mlp, after_mlp = norms
    if getattr(module, "post_self_attn_layernorm", None) is before_mlp.module:  # as GLM-4 declares
        after, before_mlp = before_mlp, after
    return DecoderLayer(
        module, attention, mlp, before, before_mlp, after, after_mlp, tuple(dropouts)
    )


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each of the module's own weights, quantised ones as they were before."""
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    for name, parametrized in getattr(module, "parametrizations", {}).items():
        state = next((p.quant_state for p in parametrized if hasattr(p, "quant_state")), None)
        shapes[name] = tuple(parametrized.original.shape if state is None else state.shape)
    return shapes


def bias_name(weight: str) -> str:
    """The name of the bias [E, N] of an experts' weight, as transformers' own ways read it."""
    return f"{weight}_bias"


def recognise_experts(module: nn.Module) -> Experts | None:
    """Two weights of three dimensions that share the first, E; under PEFT's wrappers or bare."""
    base: Any = module
    if isinstance(module, BaseTunerLayer):
        if not hasattr(module, "parameter_name"):
            return None
        base = module.get_base_layer()
    shapes = weight_shapes(base)
    large = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    if len(large) < 2 or len({shape[0] for shape in large.values()}) != 1:
        return None
    names = sorted(large, key=lambda name: math.prod(large[name]))
    down, gate_up = names[0], names[-1]
    (E, *sizes), (_, *sizes_down) = large[gate_up], large[down]
    # Gate and up are twice as wide as what goes into down: no two sizes make both of these true.
    straight = sizes == [2 * sizes_down[1], sizes_down[0]]
    transposed = sizes == [sizes_down[1], 2 * sizes_down[0]]
    wide, hidden = sizes[::-1] if transposed else sizes
    biases = {bias_name(gate_up): (E, wide), bias_name(down): (E, hidden)}
    more = sorted(n for n in set(shapes) - set(large) if shapes[n] != biases.get(n))
    activation = _gate_of(base, bias_name(gate_up) in shapes)
    problem = ""
    if len(inspect.signature(type(base).forward).parameters) != 4:  # and self
        problem = "its experts are not called with hidden states, the router's choice and weights"
    elif len(large) != 2 or not (straight or transposed):
        problem = NO_EXPERTS
    elif getattr(base, "is_transposed", transposed) != transposed:
        problem = "its experts' weights are not as is_transposed says"
    elif more:
        problem = f"its experts have more weights: {', '.join(more)}"
    elif activation is None:
        problem = "its experts' gate is not act(gate) * up with SiLU or GELU, nor a clamped SwiGLU"
    if problem and not _counts_experts(base, E):
        return None  # other weights of three dimensions
    return Experts(module, base, gate_up, down, activation or "", problem, transposed)


def _counts_experts(base: nn.Module, count: int) -> bool:
    return any("expert" in name and value == count for name, value in vars(base).items())


def _gate_of(base: Any, biased: bool) -> Activation | None:
    """The activation of gate and up, told by the values of `_apply_gate` or of the activation.

    Args:
        base: the experts.
        biased: gate and up have a bias, which only the clamped ones take.
    """
    apply_gate = getattr(base, "_apply_gate", None)
    if apply_gate is None:
        others = [getattr(base, name, None) for name in _ACTIVATION]
        return None if biased else next((n for f in others if (n := recognise_activation(f))), None)
    x = _pairs(40.0)
    gate, up = x.chunk(2, -1)
    for name, activation in _ACTIVATIONS.items():
        if not biased and _gives(apply_gate, x, activation(gate) * up):
            return name
    alphas = *_declared(base, _ALPHA), 1.0
    limits = *_declared(base, _LIMIT), math.inf
    for alpha, limit, offset, interleaved in itertools.product(
        alphas, limits, (0.0, 1.0), (False, True)
    ):
        clamped = ClampedSwiglu(alpha, limit, offset, interleaved)
        x = _pairs(40.0 if limit == math.inf else 3 * limit)
        if _gives(apply_gate, x, clamped_swiglu(x, clamped)):
            return clamped
    return None


def _declared(base: Any, names: Sequence[str]) -> list[float]:
    """The positive numbers that the module or its config has under these names."""
    holders = base, getattr(base, "config", None)
    values = [getattr(holder, name, None) for holder in holders for name in names]
    return [float(v) for v in values if isinstance(v, int | float) and v > 0]


def _pairs(reach: float) -> Tensor:
    """[2, 514] gates and ups, whichever are which: within +-4, where sigmoids bend, and +-reach."""
    x = torch.rand(2, 514, generator=torch.Generator().manual_seed(0), device="cpu")
    return (2 * x - 1) * torch.tensor([[4.0], [reach]], device="cpu")


def _gives(apply_gate: Callable[[Tensor], Any], x: Tensor, expected: Tensor) -> bool:
    try:
        with torch.no_grad():
            y = apply_gate(x)
    except Exception:  # somebody else's method may raise anything; then it is another gate
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return torch.allclose(y, expected, rtol=1e-5, atol=1e-5)


BUILTIN_STRUCTURES: tuple[Recogniser, ...] = (
    recognise_decoder_layer,
    recognise_attention,
    recognise_projections,
    recognise_gated_mlp,
    recognise_experts,
    recognise_rms_norm,
)


def recognise(
    model: nn.Module, recognisers: Sequence[Recogniser]
) -> Iterator[tuple[str, Description]]:
    """(qualified name, description) of all that a recogniser knows, outermost first."""
    for name, module in model.named_modules():
        for recogniser in recognisers:
            description = recogniser(module)
            if description is not None:
                yield name, description
