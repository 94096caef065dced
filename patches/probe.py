"""Finds out with which arguments a model calls its decoder layers.

Every layer is replaced, for one forward of a few tokens, by a recorder that returns its input: no
weight is used but the embedding's, nothing is kept, and the instances are as before afterwards.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.patches.bind import Binding, FusedForward, Unsupported

TOKENS = (
    2,
    12,
)  # batch and sequence: small, but longer than a head's or a window's edge case of one


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One recorded call: everything but the hidden states [B, S, K]."""

    hidden_states: Tensor
    kwargs: dict[str, Any]


class _Recorder(FusedForward):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.call: LayerCall | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments(args, kwargs)
        h = arguments.pop("hidden_states", None)
        if not isinstance(h, Tensor):
            raise Unsupported("its decoder layer takes no hidden_states")
        self.call = LayerCall(h.detach().clone(), arguments)
        return h


def record_layer_calls(
    backbone: nn.Module, layers: Sequence[nn.Module]
) -> dict[nn.Module, LayerCall]:
    """The call of each of `layers` in one forward of `backbone` on a few random tokens.

    Raises:
        Unsupported: the model does not run on input_ids alone.
    """
    embedding = next((m for m in backbone.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise Unsupported("the model has no token embedding")
    device = embedding.weight.device
    if device.type == "meta":
        raise Unsupported("the model's weights are not here yet (meta device)")
    binding, recorders = Binding(), [_Recorder(layer) for layer in layers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        ids = torch.randint(0, min(100, embedding.num_embeddings), TOKENS, device=device)
        try:
            for recorder in recorders:
                binding.bind(recorder.module, recorder)
            backbone(input_ids=ids, use_cache=False)
        except Unsupported:
            raise
        except (
            Exception
        ) as error:  # any model's forward may raise anything; the stock path is unharmed
            raise Unsupported(
                f"the model does not run on input_ids alone ({type(error).__name__}: {error})"
            ) from error
        finally:
            binding.undo()
    return {r.module: copy.copy(r.call) for r in recorders if r.call is not None}
