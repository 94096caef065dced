"""The whole decoder layer of a module instance, fused: tier 1 of DESIGN.md.

    q, k, v = rope(qkv(norm_1(h)))        one Function, `kernels.lora_qkv`
    a       = attention(q, k, v)          the model's own attention function
    h2      = h + o(a)                    one Function, `kernels.lora_o`
    h3      = h2 + mlp(norm_2(h2))        one Function, `kernels.lora_mlp`

With norms behind the blocks (Gemma 2 and 3), the residual is added after them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorafuse.patches.attention import AttentionReader, take_cache
from lorafuse.patches.bind import FusedForward, Unsupported
from lorafuse.patches.documents import DocumentFinder
from lorafuse.patches.hooks import has_live_hooks
from lorafuse.patches.mlp import MlpReader
from lorafuse.patches.norms import apply_norm, prologue
from lorafuse.patches.structure import DecoderLayer
from lorafuse.patches.weights import WeightFormat


class FusedDecoderLayer(FusedForward):
    """All of a pre-norm decoder layer but the attention function itself."""

    operations = ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "rope")

    def __init__(
        self,
        layer: DecoderLayer,
        formats: Sequence[WeightFormat],
        interleaved: bool = False,
        backend: str = "auto",
        finder: DocumentFinder | None = None,
    ) -> None:
        super().__init__(layer.module)
        self.layer = layer
        self.attention = AttentionReader(layer.attention, formats, interleaved, backend, finder)
        self.mlp = MlpReader(layer.mlp, formats)

    def linear_groups(self) -> list[Sequence[Any]]:
        return [*self.attention.linear_groups(), *self.mlp.linear_groups()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        try:
            arguments = self.arguments(args, kwargs)
            h = arguments.pop("hidden_states", None)
            positions = arguments.pop("position_embeddings", None)
            mask = arguments.pop("attention_mask", None)
            if not isinstance(h, Tensor) or h.dim() != 3 or h.numel() == 0 or positions is None:
                raise Unsupported("it was called without hidden states or position embeddings")
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
        post_1, post_2 = layer.attention_post_norm, layer.mlp_post_norm
        residual = post_1 is None
        a, _ = self.attention(h, attention, norm_1, residual, positions, mask, cache, arguments)
        h2 = a if post_1 is None else h + apply_norm(post_1, a)
        if post_2 is None:
            return self.mlp(h2, mlp, norm_2, True)
        return h2 + apply_norm(post_2, self.mlp(h2, mlp, norm_2, False))
