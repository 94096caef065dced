"""The whole decoder layer of a module instance, fused: tier 1 of DESIGN.md.

    q, k, v = rope(qkv(norm_1(h)))        one Function, `kernels.lora_qkv`
    a       = attention(q, k, v)          the model's own attention function
    h2      = h + o(a)                    one Function, `kernels.lora_o`
    h3      = h2 + mlp(norm_2(h2))        one Function, `kernels.lora_mlp`

With norms behind the blocks (Gemma 2 and 3), the residual is added after them; where the blocks are
scaled (Granite), with the scale in the same kernel.

What is kept of it for backward is `checkpointing`'s to say: with a tape, q, k, v and h2 are stages
that run again, and gate/up are computed again within their Function, or come back from the host.
Where all is kept, `layer_graphs` may replay what it has recorded of the parts before and behind
attention.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorafuse.kernels.lora_linear import (
    LoraProjection,
    NormPrologue,
    flat_tensors,
    fold_alignment,
    fold_columns,
    with_tensors,
)
from lorafuse.kernels.lora_o import lora_o
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.attention import AttentionReader, Pairing, take_cache
from lorafuse.patches.bind import KV_CACHES, FusedForward, Unsupported
from lorafuse.patches.checkpointing import LayerCheckpointing, trainers_function
from lorafuse.patches.documents import DocumentFinder
from lorafuse.patches.hooks import has_live_hooks
from lorafuse.patches.layer_graphs import LayerGraphs, identity
from lorafuse.patches.layer_sizes import LayerSizes
from lorafuse.patches.mlp import MlpReader
from lorafuse.patches.norms import apply_norm, prologue
from lorafuse.patches.recomputation import Note, Tape, run_stage
from lorafuse.patches.structure import DecoderLayer, RmsNorm
from lorafuse.patches.weight_room import fold
from lorafuse.patches.weights import WeightFormat


@dataclass(frozen=True, eq=False)
class Prepared:
    """One call of a layer: what it was called with beside its hidden states, and what its modules
    hold now. (Not the hidden states: a stage that runs again holds this, and they may leave.)"""

    qkv: Sequence[LoraProjection]
    output: LoraProjection
    gate_up: Sequence[LoraProjection]
    down: LoraProjection
    norm_1: NormPrologue
    norm_2: NormPrologue
    positions: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    cache: Any
    arguments: dict[str, Any]
    # Weights of the norms that are not in front of a block: on each head, and behind the blocks.
    head_norms: tuple[Tensor, ...]
    post_norms: tuple[Tensor, ...]

    def projections(self) -> tuple[LoraProjection, ...]:
        return (*self.qkv, self.output, *self.gate_up, self.down)

    def read(self) -> tuple[Any, ...]:
        """What tells one state of the layer's modules from another: see `layer_graphs.identity`."""
        norms = (self.norm_1.weight, self.norm_2.weight, *self.head_norms, *self.post_norms)
        return (
            *[identity(p) for p in self.projections()],
            *[(w.data_ptr(), w.requires_grad) for w in norms],
        )

    def parameters(self, *, before: bool) -> tuple[Tensor, ...]:
        """Those that are trained, of the part before attention or of that behind it."""
        own = self.qkv if before else (self.output, *self.gate_up, self.down)
        found = {id(t): t for t in flat_tensors(own) if t is not None}
        return tuple(t for t in found.values() if t.requires_grad)

    def apart(self) -> "Prepared":
        """With leaves of the same memory for the adapters: whose hooks do not run for these."""
        leaves: dict[int, Tensor] = {}

        def own(projections: Sequence[LoraProjection]) -> tuple[LoraProjection, ...]:
            tensors = flat_tensors(projections)
            for t in tensors:
                if t is not None and id(t) not in leaves:
                    leaves[id(t)] = t.detach().requires_grad_(t.requires_grad)
            return with_tensors(
                projections, [None if t is None else leaves[id(t)] for t in tensors]
            )

        (output,), (down,) = own([self.output]), own([self.down])
        return replace(self, qkv=own(self.qkv), output=output, gate_up=own(self.gate_up), down=down)

    def at(self, positions: tuple[Tensor, ...]) -> "Prepared":
        """The same at other positions, of a call that brings neither a mask nor more arguments."""
        pair = (positions[0], positions[1]) if positions else None
        return replace(self, positions=pair, mask=None, arguments={})


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
        # Replays the layer where it can; None: it always runs as it stands.
        self.graphs: LayerGraphs | None = None

    def ignores(self, name: str) -> bool:
        return self.attention.ignored.get(name, False)

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
            scaled=self.layer.residual_scale != 1.0,
            # transformers makes a mask for rows as long as the window; we see that it hides nothing
            window=window - (attention.backend != "auto") if isinstance(window, int) else None,
            gradients=sum(gradient_bytes(group, padded=i < 3) for i, group in enumerate(groups)),
        )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if self.checkpointing is None:
            function = trainers_function(self.module)
            if function is not None:
                # as transformers' own: what runs twice must not fill a cache twice
                kwargs |= {name: None for name in KV_CACHES if name in kwargs}
                return function(partial(self.run, **kwargs), *args)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        try:
            arguments = self.arguments(args, kwargs)
            self.attention.check_others(arguments, self.stock)
            h = arguments.pop("hidden_states", None)
            positions = arguments.pop("position_embeddings", None)
            mask = arguments.pop("attention_mask", None)
            self.check_proven(arguments)
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
        prepared = Prepared(
            *attention, *mlp, norm_1, norm_2, positions, mask, cache, arguments,
            self.head_norms(), self.post_norms(),
        )  # fmt: skip
        keeping = (
            None if self.checkpointing is None else self.checkpointing.begin(h, positions or ())
        )
        if self.graphs is not None:
            replayed = self.graphs.call(self, h, prepared, keeps_all=keeping is None)
            if replayed is not None:
                return replayed
        if keeping is None:
            return self.forward(h, prepared, None, 0)
        with keeping.tape:
            return self.forward(h, prepared, keeping.tape, keeping.tile_rows)

    def forward(self, h: Tensor, prepared: Prepared, tape: Tape | None, tile_rows: int) -> Tensor:
        """The fused path. `tape`: says what is kept; None: all. `tile_rows`: of the MLP."""
        qkv = prepared.qkv
        if tape is not None and tape.attention_again and prepared.cache is None:

            def all_of_it(note: Note, h: Tensor) -> tuple[Tensor, Tensor]:
                q, k, v, *around = self.project(note, h, prepared)
                attended = self.attend(q, k, v, prepared)
                note(attended)
                return attended, around[0] if around else h

            attended, beside = tape.stage(all_of_it, qkv, h)
        else:
            q, k, v, *around = run_stage(tape, partial(self.project, prepared=prepared), qkv, h)
            attended = self.attend(q, k, v, prepared)
            beside = around[0] if around else h
            del q, k, v, around
        return self.behind_attention(tape, attended, beside, prepared, tile_rows)

    def project(self, note: Note, h: Tensor, prepared: Prepared) -> tuple[Tensor, ...]:
        """q, k and v of `h`; and h, where nothing but a sum is made of it behind attention."""
        passes = self.layer.attention_post_norm is None
        return self.attention.project(
            note, h, prepared.qkv, prepared.norm_1, passes, prepared.positions
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
        """[B, S, Hq D]."""
        one = prepared
        return self.attention.attend(q, k, v, one.mask, one.cache, one.arguments)[0]

    def behind_attention(
        self, tape: Tape | None, attended: Tensor, h: Tensor, prepared: Prepared, tile_rows: int = 0
    ) -> Tensor:
        """The layer's output from attention's, and the layer's input beside it."""
        post_2, norm_2, mlp = (
            self.layer.mlp_post_norm, prepared.norm_2, (prepared.gate_up, prepared.down),
        )  # fmt: skip
        add = partial(self.add_attention, output=prepared.output)
        h2: Tensor = run_stage(tape, add, [prepared.output], attended, h)
        keep = tape is None or tape.spills is not None
        plain = post_2 is None and self.layer.residual_scale == 1.0
        with nullcontext() if tape is None else tape.spilling():
            block = self.mlp(h2, mlp, norm_2, plain, keep, tile_rows)
        return block if plain else self.add(post_2, block, h2)

    def add(self, post: RmsNorm | None, block: Tensor, h: Tensor) -> Tensor:
        """h + [norm](block), or h + s block with one rounding."""
        if post is not None:
            return h + apply_norm(post, block)
        return torch.add(h, block, alpha=self.layer.residual_scale)

    def head_norms(self) -> tuple[Tensor, ...]:
        norms = self.attention.q_norm, self.attention.k_norm
        return tuple(n.weight for n in norms if n is not None)

    def post_norms(self) -> tuple[Tensor, ...]:
        norms = self.layer.attention_post_norm, self.layer.mlp_post_norm
        return tuple(n.weight for n in norms if n is not None)

    def add_attention(self, note: Note, o: Tensor, h: Tensor, output: LoraProjection) -> Tensor:
        """h2 = h + o(attention), with the norm behind o where there is one."""
        post = self.layer.attention_post_norm
        plain = post is None and self.layer.residual_scale == 1.0
        a = lora_o(o, output, h if plain else None)
        if plain or post is not None:
            note(a)
        if plain:
            return a
        h2 = self.add(post, a, h)
        note(h2)
        return h2

    def fall_back(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        self.stock_calls[reason] += 1
        if self.checkpointing is not None:
            return self.checkpointing.stock(self.stock, *args, **kwargs)
        return self.stock(*args, **kwargs)


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
