"""What a decoder layer's tensors weigh in each mode, and how much it computes.

Formulas of a layer's widths alone: `patches.memory_plan` adds them up over a step's layers.
"""

from dataclasses import dataclass
from functools import cache

from lorafuse.kernels.linear_cross_entropy import chunk_rows
from lorafuse.patches.modes import OFF, OFFLOAD, TILE_ROWS
from lorafuse.patches.recomputation import SMALL_BYTES

__all__ = ["LayerSizes"]

_LOGIT_BYTES = 2**29  # the loss's chunk of logits
_SCALED_ROWS = 8192  # of the loss's gradient, in fp32 at a time
_FP32 = 4


@dataclass(frozen=True)
class LayerSizes:
    """What decides how much a layer's tensors weigh. Memory is estimated from above.

    Attributes:
        hidden: H.
        qkv: N, outputs of q, k and v.
        attention: A, inputs of o.
        gate_up: 2 I, outputs of gate and up.
        rotated: outputs of q and k that lie apart from `qkv` once normed and turned, or 0.
        folds: F, columns for LoRA beside qkv, o, gate/up and down.
        heads: of queries.
        shares_heads: there are fewer heads of keys.
        norms_behind: the blocks' outputs are normed, too.
        scaled: they are scaled before they are added.
        window: of sliding attention, in tokens that need no mask; None: full attention.
        gradients: bytes of the adapters' gradients, which backward leaves.
    """

    hidden: int
    qkv: int
    attention: int
    gate_up: int
    rotated: int = 0
    folds: tuple[int, int, int, int] = (64, 64, 64, 64)
    heads: int = 32
    shares_heads: bool = True
    norms_behind: bool = False
    scaled: bool = False
    window: int | None = None
    gradients: int = 0

    @cache  # noqa: B019  # a handful of sizes, asked in each forward pass
    def kept(self, mode: str, tokens: int, length: int, itemsize: int, stream: int) -> int:
        """Bytes that stay on the GPU from forward to backward.

        Args:
            mode: one of `MODES`.
            tokens: T.
            length: of them, in a row.
            itemsize: bytes of an element.
            stream: of the residual stream's.
        """
        kept = tokens * (itemsize * sum(self.folds[2:]) + 2 * _FP32 * (1 + self.norms_behind))
        kept += sum(self._large(tokens, length, itemsize, stream))
        if mode == OFFLOAD:
            kept -= self.taken(tokens, length, itemsize, stream)
        if mode == OFF:
            more = self.qkv + self.rotated + self.gate_up + self.folds[2]
            kept += itemsize * tokens * (more + self.hidden * self.norms_behind)
            kept += stream * tokens * self.hidden  # h2
        return kept

    def _large(self, tokens: int, length: int, itemsize: int, stream: int) -> list[int]:
        """Bytes of each tensor that every mode keeps, and that grows large with the tokens."""
        # o, with norms behind the MLP's output; XA of qkv and o
        elements = [self.attention, self.hidden * self.norms_behind, *self.folds[:2]]
        if self.window is not None and length > self.window:
            # A dense mask: k and v are repeated for each query head, and the mask is kept as bias.
            elements += [self.attention, self.attention, length]
        # log-sum-exp; rstd of the norms on q's and k's heads
        both = self.rotated * self.heads // self.attention
        wide = [self.heads, self.heads, both - self.heads] if both else [self.heads]
        return [
            tokens * stream * self.hidden,  # h
            *(tokens * itemsize * one for one in elements),
            *(tokens * _FP32 * one for one in wide),
        ]

    @cache  # noqa: B019
    def taken(self, tokens: int, length: int, itemsize: int, stream: int) -> int:
        """Bytes that `offload` takes to the host."""
        large = self._large(tokens, length, itemsize, stream)
        return sum(one for one in large if one >= SMALL_BYTES)

    def gate_up_bytes(self, tokens: int, itemsize: int) -> int:
        """Of gate/up, with room for the gradient of what is folded in."""
        return tokens * itemsize * (self.gate_up + self.folds[2])

    def forward_flops(self, tokens: int, length: int) -> float:
        """Of the layer's products and its attention."""
        H, seen = self.hidden, min(length, self.window or length)
        products = H * self.qkv + self.attention * H + H * self.gate_up + H * self.gate_up // 2
        return 2.0 * tokens * (products + (length - seen / 2) * seen / length * 2 * self.attention)

    @cache  # noqa: B019
    def working(
        self, mode: str, tokens: int, itemsize: int, stream: int, spilled: bool = False
    ) -> tuple[int, int]:
        """Bytes that one layer's (forward, backward) needs beside what is kept and fetched.

        Args:
            mode: one of `MODES`.
            tokens: T.
            itemsize: bytes of an element.
            stream: of the residual stream's.
            spilled: gate/up goes to the host.
        """
        T, H, N, A = tokens, self.hidden, self.qkv, self.attention
        wide_H = H * stream // itemsize  # of the residual stream
        tiles = -(-T // TILE_ROWS.get(mode, T))
        rows = -(-T // tiles)
        f_qkv, f_o, f_gate_up, f_down = self.folds
        inner = self.gate_up // 2
        W_qkv, W_o = N * (H + f_qkv), H * (A + f_o)
        W_gate_up, W_down = self.gate_up * (H + f_gate_up), H * (inner + f_down)
        again = mode != OFF
        apart = self.norms_behind or self.scaled  # the residual is added behind the block
        behind = H * apart
        # What is added to the stream, or comes from it, is cast.
        cast = H * (stream != itemsize and not apart)
        makes = again and not spilled
        gate_up = rows * (self.gate_up + f_gate_up) if makes else 0
        # What is written once for several products: W of gate/up, of down too with several tiles.
        keeps = rows >= H and (makes or tiles > 1)
        first = (self.gate_up + f_gate_up) * (H + f_gate_up) if keeps else 0
        second = (H + f_down) * (inner + f_down) if keeps and tiles > 1 else 0
        in_tile = first + second + max(
            rows * (H + f_gate_up) + (0 if first else W_gate_up),  # x, and the GEMM, or that of dx
            rows * (inner + f_down + cast) + (0 if second else W_down),  # m or dm
        )  # fmt: skip
        block = T * (N + self.rotated + 2 * wide_H + behind) if again else T * wide_H
        forward = max(
            block + gate_up + in_tile,
            T * (H + f_qkv) + W_qkv + (T * N if again else 0),
        )
        dh, dh2 = T * (wide_H + f_down), T * (wide_H + f_o)
        through = T * (2 * H + f_down) * apart  # dd, and a or dh2
        h2 = T * wide_H if again else 0
        of_dh = rows * (f_down if cast else 0)  # beside the cast one
        mlp = dh + through + h2 + of_dh + max(
            (dh2 if tiles > 1 else 0) + gate_up + in_tile,
            dh2 + rows * H,
            T * A + W_o,
        )  # fmt: skip
        # What `off` has let go of when attention's turn comes.
        gone = 0 if again else T * (self.gate_up + f_gate_up + H)
        workspace = T * (2 * A * self.shares_heads * itemsize + _FP32 * (A + self.heads))
        qkv = T * (N + self.rotated) if again else 0
        turned = T * self.rotated
        attention = dh2 + T * (H + f_o) * (apart or cast > 0) - gone + max(
            T * A + qkv + T * (H + f_qkv) + W_qkv,
            T * A + qkv + T * N + workspace // itemsize,
            qkv + T * N + turned,
        )  # fmt: skip
        freed = T * A + (0 if again else T * (N + self.rotated))
        projections = dh2 + T * N - gone + max(
            T * (N + f_qkv) + T * H + W_qkv, T * H + dh
        )  # fmt: skip
        if mode != OFFLOAD:
            projections -= freed
        return itemsize * forward, itemsize * max(mlp, attention, projections)

    def head(self, tokens: int, vocabulary: int, itemsize: int, stream: int) -> int:
        """Bytes of the final norm and the loss, beside what is kept."""
        size, wide = itemsize * tokens * self.hidden, stream * tokens * self.hidden
        chunk = chunk_rows(tokens, vocabulary, itemsize, _LOGIT_BYTES)
        logits = itemsize * vocabulary * chunk
        if stream != itemsize:  # the head is cast, and the rows that are picked
            logits += itemsize * vocabulary * self.hidden + stream * chunk * self.hidden
        scaled = _FP32 * min(tokens, _SCALED_ROWS) * self.hidden
        rows = 24 * tokens
        return rows + wide + max(2 * size + logits, size + wide + scaled, 3 * wide)
