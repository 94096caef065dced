"""Fused attention of a module instance: as one block, or as its projections alone.

The block form replaces the attention module's forward: projections, norms on the heads, RoPE, the
model's own attention function, output projection. The projections form leaves that forward alone:
the first of q, k and v that is called with a tensor computes all three, and the others hand out
theirs.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from lorafuse.kernels.lora_linear import LoraProjection, NormPrologue, lora_linear
from lorafuse.kernels.lora_o import lora_o
from lorafuse.kernels.lora_qkv import Heads, Rotary, lora_qkv
from lorafuse.kernels.rope import reference as rope_reference
from lorafuse.kernels.rope import rope
from lorafuse.kernels.varlen_attention import serves, varlen_attention
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.bind import KV_CACHES, FusedForward, Unsupported
from lorafuse.patches.documents import DocumentFinder, Layout
from lorafuse.patches.norms import apply_norm, prologue
from lorafuse.patches.recomputation import Note, ignore
from lorafuse.patches.structure import Attention, Projections, drops_out
from lorafuse.patches.weights import WeightFormat

# cuDNN first: 0.47 + 1.54 ms against flash's 0.90 + 2.84 (forward + backward of a layer of 2 x 4096
# tokens, 32 heads of 128, bf16, H100, torch 2.11, 2026-11-23).
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

# Tensors that the fused form reads, or leaves to the attention function.
_READ = ("hidden_states", "attention_mask", "position_bias", "position_embeddings")

# What a batch's mask became.
CAUSAL = "plain causal attention, its mask saying no more"
DOCUMENTS = "attention within each document, without the mask"
MASK = "attention with a dense mask"


class Pairing(StrEnum):
    """Which features RoPE rotates together, and how cos and sin [.., S, D] lie.

    Attributes:
        HALVES: feature i with i + D/2; cos in halves (Llama).
        NEIGHBOURS: feature 2i with 2i + 1; cos likewise (Cohere).
        NEIGHBOURS_OF_HALVES: feature 2i with 2i + 1, but cos in halves; features beyond them stay
            as they are (GLM, ERNIE 4.5).
        NONE: nothing is rotated (every fourth layer of SmolLM3).
    """

    HALVES = "halves"
    NEIGHBOURS = "neighbours"
    NEIGHBOURS_OF_HALVES = "neighbours of halves"
    NONE = "none"

    @property
    def interleaved(self) -> bool:
        return self in (Pairing.NEIGHBOURS, Pairing.NEIGHBOURS_OF_HALVES)

    def lay_out(self, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """cos and sin as the kernels read them, for heads of `size` features."""
        if self is not Pairing.NEIGHBOURS_OF_HALVES:
            return cos, sin
        rotated, half = cos.shape[-1], cos.shape[-1] // 2
        cos, sin = (x[..., :half].repeat_interleave(2, dim=-1) for x in (cos, sin))
        return F.pad(cos, (0, size - rotated), value=1.0), F.pad(sin, (0, size - rotated))


def rope_axes(module: Any) -> tuple[int, ...]:
    """How many features of half a head turn by each axis of the positions; () without axes.

    M-RoPE's time, height and width: a token of text has the same position on each.
    """
    for holder in (module, getattr(module, "config", None)):
        rope = getattr(holder, "rope_parameters", None)
        if isinstance(rope, dict) and "mrope_section" in rope:
            return tuple(rope["mrope_section"])
    return ()


def merge_axes(x: Tensor, axes: Sequence[int]) -> Tensor:
    """[B, S, R] of cos or sin [axes, B, S, R]: section i of each half comes from axis i."""
    sections = torch.split(x, [*axes, *axes], dim=-1)
    return torch.cat([one[i % len(axes)] for i, one in enumerate(sections)], dim=-1)


class AttentionReader:
    """Attention as described, computed by the kernels around the model's own attention function.

    Args:
        attention: the description.
        formats: weight formats.
        pairing: of RoPE's features.
        backend: "auto" prefers cuDNN under torch's sdpa on CUDA, and takes a mask of documents or
            padding for what it says; else torch chooses.
        finder: shared by the layers of a model.
    """

    def __init__(
        self,
        attention: Attention,
        formats: Sequence[WeightFormat],
        pairing: Pairing,
        backend: str,
        finder: DocumentFinder | None = None,
    ) -> None:
        self.module = attention.module
        self.finder = finder or DocumentFinder()
        self.qkv = tuple(LinearReader(linear, formats) for linear in attention.qkv)
        self.o = LinearReader(attention.o, formats)
        self.heads = Heads(attention.query_heads, attention.key_value_heads, attention.head_size)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.pairing, self.axes = pairing, rope_axes(self.module)
        self.round_products = rounds_rope_products(self.module, pairing)
        self.backend = backend
        self.extras = _extra_arguments(self.module)
        # Names of further tensors that calls brought -> whether the stock forward ignores them.
        self.ignored: dict[str, bool] = {}
        # What became of the masks of so many calls: CAUSAL, DOCUMENTS or MASK.
        self.ways: Counter[str] = Counter()
        attention_function(self.module)  # raises where there is none

    def linear_groups(self) -> list[Sequence[Any]]:
        """(q, k and v), (o)."""
        return [self.qkv, (self.o,)]

    @property
    def repeats(self) -> bool:
        """Whether attention, run again, gives the same bits: not with dropout."""
        return not _dropout(self.module)

    @property
    def norms_heads(self) -> bool:
        """Whether q or k has a norm on each head."""
        return self.q_norm is not None or self.k_norm is not None

    def check_call(self, h: Any, position_embeddings: Any) -> None:
        """Raises Unsupported where a call does not bring what is needed."""
        if not isinstance(h, Tensor) or h.dim() != 3 or h.numel() == 0:
            raise Unsupported("it was called without hidden states")
        if self.pairing is not Pairing.NONE and (
            not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2
        ):
            raise Unsupported("it was called without position embeddings (cos, sin)")
        if position_embeddings is not None and self.pairing is not Pairing.NONE:
            cos, axes = position_embeddings[0], self.axes
            if cos.dim() == 4 and (len(axes), 2 * sum(axes)) != (cos.shape[0], cos.shape[-1]):
                raise Unsupported("its positions have several axes, not those of mrope_section")
            if cos.dim() not in (2, 3, 4):
                raise Unsupported(f"its position embeddings are of shape {list(cos.shape)}")

    def check_others(self, arguments: Mapping[str, Any], stock: Callable[..., Any]) -> None:
        """Raises Unsupported where a call brings a tensor that the stock forward reads and we not.

        Keys and values of another sequence, say: then this attention is a cross-attention.
        """
        for name, value in arguments.items():
            if name in _READ or not _holds_floats(value):
                continue
            if name not in self.ignored:
                self.ignored[name] = ignores(stock, arguments, name)
            if not self.ignored[name]:
                raise Unsupported(f"it was called with {name}, which the fused form does not read")

    def prepare(self, x: Tensor) -> tuple[list[LoraProjection], LoraProjection]:
        """(q, k and v, o) as kernel projections; raises Unsupported."""
        if drops_out(self.module, getattr(self.module, "attention_dropout", None)):
            raise Unsupported("the attention has a dropout of its own behind o")
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                prologue(norm) if not norm.weight.requires_grad else None
        return [reader.projection(x) for reader in self.qkv], self.o.projection(x)

    def project(
        self,
        note: Note,
        h: Tensor,
        projections: Sequence[LoraProjection],
        norm: NormPrologue | None,
        residual: bool,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """q [B, S, Hq, D], k, v [B, S, Hk, D], and h for `residual`; notes what is saved of it."""
        plain, rotary = not self.norms_heads, None
        if position_embeddings is not None and self.pairing is not Pairing.NONE:
            cos, sin = position_embeddings
            if cos.dim() == 4:
                cos, sin = merge_axes(cos, self.axes), merge_axes(sin, self.axes)
            elif cos.dim() == 2:  # [S, R], as Pixtral has them
                cos, sin = cos[None], sin[None]
            cos, sin = self.pairing.lay_out(cos, sin, self.heads.size)
            rotary = Rotary(cos, sin, self.pairing.interleaved, self.round_products)
        q, k, v, *around = lora_qkv(
            h, projections, self.heads, norm, rotary if plain else None, residual
        )
        note(q)  # in whose buffer k and v lie, too
        if not plain:
            if self.q_norm is not None:
                q = apply_norm(self.q_norm, q)
            if self.k_norm is not None:
                k = apply_norm(self.k_norm, k)
            if rotary is not None:
                q, k = rope(q, k, cos, sin, rotary.interleaved, self.round_products)
            note(q)
            note(k)
        return q, k, v, *around

    def __call__(
        self,
        h: Tensor,
        projections: Sequence[LoraProjection],
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """(attention [B, S, Hq D], attention weights or None)."""
        q, k, v = self.project(ignore, h, projections, None, False, position_embeddings)
        return self.attend(q, k, v, attention_mask, cache, kwargs)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """(attention [B, S, Hq D] of q [B, S, Hq, D], k and v [B, S, Hk, D], weights or None)."""
        module, function = self.module, attention_function(self.module)
        if cache is None and self.backend == "auto":
            layout, own = self.layout(q, attention_mask, kwargs, function)
            if layout is not None and layout.plain:
                self.ways[CAUSAL] += attention_mask is not None
                attention_mask, function = None, own
            elif layout is not None and serves(q):
                self.ways[DOCUMENTS] += 1
                shape = q.shape[:2]
                q, k, v = (x.flatten(0, 1) for x in (q, k, v))
                attended = varlen_attention(q, k, v, layout.documents, self.scale(q))
                return attended.view(*shape, -1), None
        self.ways[MASK] += attention_mask is not None
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, module.layer_idx)
        with self.backends(q, attention_mask):
            attended, weights = function(
                module,
                q,
                k,
                v,
                attention_mask,
                dropout=_dropout(module) if module.training else 0.0,
                scaling=module.scaling,
                **self.extras,
                **kwargs,
            )
        return attended.flatten(2), weights

    def scale(self, q: Tensor) -> float:
        """The factor of the scores, as torch's sdpa takes it."""
        scaling = self.module.scaling
        return float(q.shape[-1] ** -0.5 if scaling is None else scaling)  # type: ignore[arg-type]

    def layout(
        self,
        q: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
        function: Callable[..., Any],
    ) -> tuple[Layout | None, Callable[..., Any]]:
        """(how the documents of this batch lie, or None; the function that the rest goes to).

        Only in training, where no one reads the rows of padding, and only under torch's sdpa, whose
        result is all that the mask says. Axolotl puts a function of its own in sdpa's place when it
        packs: that one reads the documents from the positions, and stands aside for a mask.
        """
        module = self.module
        config = getattr(module, "config", None)
        if (
            implementation(module) != "sdpa"
            or not module.training
            or not getattr(module, "is_causal", True)
            or kwargs.get("is_causal") is False
            or kwargs.get("position_bias") is not None
            or _dropout(module)
            or getattr(config, "output_router_logits", False)  # padding takes part in that loss
        ):
            return None, function
        batch, length = q.shape[:2]
        own = getattr(function, "_axolotl_sdpa_original", None)
        if mask is not None:
            if mask.dim() != 4 or mask.shape[-2:] != (length, length):
                return None, function
            return self.finder.of_mask(mask, batch), own or function
        positions = kwargs.get("position_ids")
        if own is None or not isinstance(positions, Tensor):
            return None, function
        window = self.extras.get("sliding_window")
        layout = self.finder.of_positions(positions, batch)
        if layout is None or (window and layout.documents.longest > window):
            return None, function
        return layout, own

    def backends(self, h: Tensor, attention_mask: Tensor | None) -> AbstractContextManager[Any]:
        """The preferred order of torch's attention backends for this call."""
        if self.prefers_cudnn(h) and attention_mask is None:
            return sdpa_kernel(_BACKENDS, set_priority=True)
        return nullcontext()

    def prefers_cudnn(self, h: Tensor) -> bool:
        if self.backend != "auto" or not h.is_cuda or implementation(self.module) != "sdpa":
            return False
        return torch.cuda.get_device_capability(h.device) >= (9, 0)


def implementation(module: Any) -> str:
    """Name of the attention implementation that the module's config asks for."""
    return str(getattr(getattr(module, "config", None), "_attn_implementation", "eager"))


def attention_function(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the stock forward calls: from transformers' registry, or the file's own.

    Raises:
        Unsupported: the model has neither.
    """
    name = implementation(module)
    registry = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    if name in registry:
        found: Callable[..., tuple[Tensor, Tensor | None]] = registry[name]
        return found
    own = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if own is None:
        raise Unsupported(f"its attention implementation {name!r} is not transformers' interface")
    return own  # type: ignore[no-any-return]


def rounds_rope_products(module: nn.Module, pairing: Pairing) -> bool:
    """Whether the model's own `apply_rotary_pos_emb` rounds each product in 16 bit.

    It is told by that function's bits on random bf16 heads; where there is none to ask, products
    stay in fp32. Only the last bit of q and k hangs on it, not whether they are right.
    """
    file, axes = sys.modules.get(type(module).__module__), rope_axes(module)
    own = getattr(file, "apply_rotary_pos_emb", None)
    if axes:
        of_axes = getattr(file, "apply_multimodal_rotary_pos_emb", None)
        own = own if of_axes is None else partial(_on_one_axis, of_axes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, 2, 3, 16, generator=generator).bfloat16()
        angles = torch.rand(1, 3, 8, generator=generator).repeat(1, 1, 2)
        if pairing is Pairing.NEIGHBOURS:
            angles = angles.view(1, 3, 2, 8).transpose(2, 3).reshape(1, 3, 16)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        try:
            stock = own(q, k, cos, sin)[0]  # type: ignore[misc]
            cos, sin = pairing.lay_out(cos, sin, q.shape[-1])
            distances = [
                (
                    rope_reference(q.transpose(1, 2), cos, sin, pairing.interleaved, rounded)
                    - stock.transpose(1, 2)
                ).abs()
                for rounded in (False, True)
            ]
        except Exception:  # somebody else's function may raise anything
            return False
        return bool(distances[1].sum() < distances[0].sum())


def _on_one_axis(
    own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """A function for positions of several axes, called with the same position on each."""
    half = cos.shape[-1] // 2
    return own(q, k, cos.expand(3, *cos.shape), sin.expand(3, *sin.shape), [half - 2, 1, 1])


def _extra_arguments(module: Any) -> dict[str, Any]:
    """What transformers' attention modules pass to the attention function besides q, k and v."""
    extras: dict[str, Any] = {}
    config = getattr(module, "config", None)
    if hasattr(module, "sliding_window"):
        extras["sliding_window"] = module.sliding_window
    elif getattr(config, "sliding_window", None) is not None:
        extras["sliding_window"] = config.sliding_window  # type: ignore[union-attr]
    if getattr(module, "attn_logit_softcapping", None) is not None:
        extras["softcap"] = module.attn_logit_softcapping
    return extras


def _dropout(module: Any) -> float:
    rate = getattr(module, "attention_dropout", 0.0)
    return float(rate.p if isinstance(rate, torch.nn.Dropout) else rate)


def _holds_floats(value: Any) -> bool:
    """A tensor of floats, or a tuple of such."""
    if isinstance(value, tuple):
        return bool(value) and all(map(_holds_floats, value))
    return isinstance(value, Tensor) and value.is_floating_point()


def _others(value: Any) -> Any:
    """Other numbers in the same place."""
    return tuple(map(_others, value)) if isinstance(value, tuple) else torch.randn_like(value)


def ignores(stock: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> bool:
    """Whether a module's stock forward, called so, gives the same bits whatever `name` holds."""
    value = arguments[name]
    arguments = dict(arguments) | {one: None for one in KV_CACHES if one in arguments}
    outputs = []
    devices = {x.device for x in tree_leaves(value) if x.is_cuda}
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        for given in (value, _others(value)):
            torch.manual_seed(1)
            output = stock(**{**arguments, name: given})
            outputs.append(output[0] if isinstance(output, tuple) else output)
    return all(isinstance(o, Tensor) for o in outputs) and torch.equal(*outputs)


def take_cache(arguments: dict[str, Any], training: bool) -> Any:
    """Takes the KV cache out of a call's arguments.

    Models make an empty cache in training too where `use_cache` is on; it is filled as stock does.

    Raises:
        Unsupported: a cache outside training (generation), or attention weights are asked for.
    """
    if arguments.get("output_attentions"):
        raise Unsupported("attention weights were asked for")
    caches = [arguments.pop(name, None) for name in KV_CACHES]
    cache = next((c for c in caches if c is not None), None)
    if cache is not None and not training:
        raise Unsupported("it was called with a KV cache (generation)")
    return cache


class FusedAttention(FusedForward):
    """Attention part: q, k and v in one GEMM with RoPE behind it, o with LoRA folded in."""

    operations = ("lora_qkv", "lora_o", "rope")

    def __init__(
        self,
        attention: Attention,
        formats: Sequence[WeightFormat],
        pairing: Pairing = Pairing.HALVES,
        backend: str = "auto",
        finder: DocumentFinder | None = None,
    ) -> None:
        super().__init__(attention.module)
        self.attention = AttentionReader(attention, formats, pairing, backend, finder)

    def ignores(self, name: str) -> bool:
        return self.attention.ignored.get(name, False)

    def linear_groups(self) -> list[Sequence[Any]]:
        return self.attention.linear_groups()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            arguments = self.arguments(args, kwargs)
            self.attention.check_others(arguments, self.stock)
            h = arguments.pop("hidden_states", None)
            positions = arguments.pop("position_embeddings", None)
            mask = arguments.pop("attention_mask", None)
            self.check_proven(arguments)
            self.attention.check_call(h, positions)
            cache = take_cache(arguments, self.module.training)
            qkv, output = self.attention.prepare(h)
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, *args, **kwargs)
        self.calls += 1
        attended, weights = self.attention(h, qkv, positions, mask, cache, arguments)
        return lora_o(attended, output), weights


class SharedProjections:
    """q, k and v of one input: computed together at the first call, handed out at the others.

    Handed out only where nothing has changed in between: the input's content, whether gradients are
    recorded, autocast.
    """

    def __init__(self, projections: Projections, formats: Sequence[WeightFormat]) -> None:
        self.readers = tuple(LinearReader(linear, formats) for linear in projections.qkv)
        if len({id(reader.module) for reader in self.readers}) < len(self.readers):
            raise Unsupported("one module stands for two of its projections")
        self.input: Tensor | None = None
        self.when: tuple[Any, ...] = ()
        self.outputs: dict[int, Tensor] = {}

    def output(self, index: int, x: Tensor) -> Tensor:
        """Projection `index` of `x`; raises Unsupported."""
        when = _circumstances(x)
        if self.input is not x or self.when != when or index not in self.outputs:
            self.outputs, self.input = {}, None
            states = [reader.projection(x) for reader in self.readers]
            self.outputs = dict(enumerate(lora_linear(x, states)))
            self.input, self.when = x, when
        y = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return y


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    """Where these are equal, a product of `x` comes out the same, with the same gradient."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    version = 0 if x.is_inference() else x._version  # inference tensors count no versions
    return version, torch.is_grad_enabled(), autocast


class FusedProjection(FusedForward):
    """One of the projections that share an input."""

    operations = ("lora_qkv",)

    def __init__(self, shared: SharedProjections, index: int) -> None:
        super().__init__(shared.readers[index].module)
        self.shared, self.index = shared, index

    def linear_groups(self) -> list[Sequence[Any]]:
        return [self.shared.readers] if self.index == 0 else []

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return self.fall_back("it was called with more than one tensor", *args, **kwargs)
        try:
            if args[0].numel() == 0:
                raise Unsupported("its input is empty")
            y = self.shared.output(self.index, args[0])
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, *args)
        self.calls += 1
        return y


class FusedOutputProjection(FusedForward):
    """The output projection alone, with LoRA folded in."""

    operations = ("lora_o",)

    def __init__(self, projections: Projections, formats: Sequence[WeightFormat]) -> None:
        assert projections.o is not None
        super().__init__(projections.o)
        self.reader = LinearReader(projections.o, formats)

    def linear_groups(self) -> list[Sequence[Any]]:
        return [(self.reader,)]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return self.fall_back("it was called with more than one tensor", *args, **kwargs)
        try:
            if args[0].numel() == 0:
                raise Unsupported("its input is empty")
            projection = self.reader.projection(args[0])
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, *args)
        self.calls += 1
        return lora_o(args[0], projection)
