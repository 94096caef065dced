"""The whole decoder layer of a module instance, fused: tier 1 of DESIGN.md.

    q, k, v = rope(qkv(norm_1(h)))        one Function, `kernels.lora_qkv`
    a       = attention(q, k, v)          the model's own attention function
    h2      = h + o(a)                    one Function, `kernels.lora_o`
    h3      = h2 + mlp(norm_2(h2))        one Function, `kernels.lora_mlp`

With norms behind the blocks (Gemma 2 and 3), the residual is added after them.

What is kept of it for backward is `checkpointing`'s to say: with a tape, q, k, v and h2 are stages
that run again, and gate/up are computed again within their Function.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lorafuse.kernels.lora_linear import (
    LoraProjection,
    NormPrologue,
    fold_alignment,
    fold_columns,
)
from lorafuse.kernels.lora_o import lora_o
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.attention import AttentionReader, Pairing, take_cache
from lorafuse.patches.bind import FusedForward, Unsupported
from lorafuse.patches.checkpointing import LayerCheckpointing, LayerSizes
from lorafuse.patches.documents import DocumentFinder
from lorafuse.patches.hooks import has_live_hooks
from lorafuse.patches.mlp import MlpReader
from lorafuse.patches.norms import apply_norm, prologue
from lorafuse.patches.recomputation import Note, Tape, run_stage
from lorafuse.patches.structure import DecoderLayer
from lorafuse.patches.weights import WeightFormat


class FusedDecoderLayer(FusedForward):
    """All of a pre-norm decoder layer but the attention function itself."""

    operations = ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "rope")

    def __init__(
        self,
        layer: DecoderLayer,
        formats: Sequence[WeightFormat],
        pairing: Pairing = Pairing.HALVES,
        backend: str = "auto",
        finder: DocumentFinder | None = None,
    ) -> None:
        super().__init__(layer.module)
        self.layer = layer
        self.attention = AttentionReader(layer.attention, formats, pairing, backend, finder)
        self.mlp = MlpReader(layer.mlp, formats)
        # How this layer keeps its activations; None: all of them stay.
        self.checkpointing: LayerCheckpointing | None = None

    def linear_groups(self) -> list[Sequence[Any]]:
        return [*self.attention.linear_groups(), *self.mlp.linear_groups()]

    def sizes(self) -> LayerSizes:
        """What decides how much memory its activations take."""
        attention, mlp = self.attention, self.mlp
        groups = (attention.qkv, (attention.o,), mlp.gate_up, (mlp.down,))
        heads, window = attention.heads, getattr(attention.module, "sliding_window", None)
        apart = (heads.query + heads.key_value) * heads.size if attention.norms_heads else 0
        fold_qkv, fold_o, fold_gate_up, fold_down = (fold(group) for group in groups)
        return LayerSizes(
            hidden=mlp.gate_up[0].in_features,
            qkv=sum(reader.out_features for reader in attention.qkv),
            attention=attention.o.in_features,
            gate_up=sum(reader.out_features for reader in mlp.gate_up),
            rotated=apart,
            folds=(fold_qkv, fold_o, fold_gate_up, fold_down),
            heads=heads.query,
            shares_heads=heads.query != heads.key_value,
            norms_behind=self.layer.mlp_post_norm is not None,
            window=window if isinstance(window, int) else None,
            gradients=sum(gradient_bytes(group, padded=i < 3) for i, group in enumerate(groups)),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        try:
            arguments = self.arguments(args, kwargs)
            self.attention.check_others(arguments, self.stock)
            h = arguments.pop("hidden_states", None)
            positions = arguments.pop("position_embeddings", None)
            mask = arguments.pop("attention_mask", None)
            self.attention.check_call(h, positions)
            cache = take_cache(arguments, layer.module.training)
            for module in (layer.attention.module, layer.mlp.module):
                if has_live_hooks(module):
                    raise Unsupported(f"a hook on {type(module).__name__} has to run")
            if layer.module.training and any(dropout.p for dropout in layer.dropouts):
                raise Unsupported("it drops out its residual branches")
            norm_1, norm_2 = prologue(layer.attention_norm), prologue(layer.mlp_norm)
            attention, mlp = self.attention.prepare(h), self.mlp.prepare(h)
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, *args, **kwargs)
        self.calls += 1
        keeping = (
            None if self.checkpointing is None else self.checkpointing.begin(h, positions or ())
        )
        forward = partial(
            self.forward, h, attention, mlp, norm_1, norm_2, positions, mask, cache, arguments
        )
        if keeping is None:
            return forward(None, 0)
        with keeping.tape:
            return forward(keeping.tape, keeping.tile_rows)

    def forward(
        self,
        h: Tensor,
        attention: tuple[Sequence[LoraProjection], LoraProjection],
        mlp: tuple[Any, Any],
        norm_1: NormPrologue,
        norm_2: NormPrologue,
        positions: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        arguments: dict[str, Any],
        tape: Tape | None,
        tile_rows: int,
    ) -> Tensor:
        """The fused path. `tape`: says what is kept; None: all. `tile_rows`: of the MLP."""
        post_1, post_2 = self.layer.attention_post_norm, self.layer.mlp_post_norm
        qkv, output = attention
        attended, beside, _ = self.attention(
            h, qkv, norm_1, post_1 is None, positions, mask, cache, arguments, tape
        )
        add = partial(self.add_attention, output=output)
        h2: Tensor = run_stage(tape, add, [output], attended, beside)
        keep = tape is None
        if post_2 is None:
            return self.mlp(h2, mlp, norm_2, True, keep, tile_rows)
        return h2 + apply_norm(post_2, self.mlp(h2, mlp, norm_2, False, keep, tile_rows))

    def add_attention(self, note: Note, o: Tensor, h: Tensor, output: LoraProjection) -> Tensor:
        """h2 = h + o(attention), with the norm behind o where there is one."""
        post = self.layer.attention_post_norm
        a = lora_o(o, output, h if post is None else None)
        note(a)
        if post is None:
            return a
        h2 = h + apply_norm(post, a)
        note(h2)
        return h2

    def fall_back(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        self.stock_calls[reason] += 1
        if self.checkpointing is not None:
            return self.checkpointing.stock(self.stock, *args, **kwargs)
        return self.stock(*args, **kwargs)


def fold(readers: Sequence[LinearReader]) -> int:
    """Columns that LoRA and bias take beside a group's input, as `Group.fold_forward`."""
    columns = sum(A.shape[0] for reader in readers for A, _ in reader.pairs)
    columns += any(getattr(reader.base, "bias", None) is not None for reader in readers)
    align = fold_alignment(next(readers[0].base.parameters()).device)
    return fold_columns(columns, align)


def gradient_bytes(readers: Sequence[LinearReader], *, padded: bool) -> int:
    """Of the adapters of one group.

    Args:
        readers: of its layers.
        padded: those of A are views of one product [fold, K] where they are in fp32.
    """
    pairs = [pair for reader in readers for pair in reader.pairs]
    if not pairs:
        return 0
    size, K = pairs[0][0].element_size(), readers[0].in_features
    rank = sum(A.shape[0] for A, _ in pairs)
    align = fold_alignment(pairs[0][0].device)
    rows = fold_columns(rank, align) if padded and size == 4 else rank
    return size * (rows * K + sum(B.numel() for _, B in pairs))
