"""Finds out with which arguments a model calls its decoder layers.

Every layer is replaced, for one forward of a few tokens (of a vision tower: a small image), by a
recorder that returns its input: no weight is used but the embedding's, nothing is kept, and the
instances are as before afterwards.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.patches.bind import Binding, FusedForward, Unsupported

TOKENS = (
    2,
    12,
)  # batch and sequence: small, but longer than a head's or a window's edge case of one
# A side of the image that a vision tower is tried with.
PATCHES = 4
# What a layer is tried with at most: stock attention may hold the square of it for each head.
MOST_PATCHES = 1024


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
        self.call = LayerCall(h.detach().clone(), _axes_apart(arguments))
        return h


def _axes_apart(arguments: dict[str, Any]) -> dict[str, Any]:
    """Position embeddings [axes, B, S, R] of text turned by other positions on each axis.

    Text has the same position on all of them: a mix-up of time, height and width would not show.
    """
    positions = arguments.get("position_embeddings")
    if not isinstance(positions, tuple) or not all(
        isinstance(x, Tensor) and x.dim() == 4 for x in positions
    ):
        return arguments
    apart = tuple(
        torch.stack([axis.roll(i, dims=-2) for i, axis in enumerate(x)]) for x in positions
    )
    return {**arguments, "position_embeddings": apart}


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

    def run() -> None:
        assert embedding is not None
        ids = torch.randint(0, min(100, embedding.num_embeddings), TOKENS, device=device)
        backbone(input_ids=ids, use_cache=False)

    return _record(layers, run, device, "input_ids")


def record_vision_calls(
    tower: nn.Module, layers: Sequence[nn.Module]
) -> dict[nn.Module, LayerCall]:
    """The call of each of `layers` in one forward of a vision tower on a random image.

    Args:
        tower: reads pixel_values [N, C, height, width]; its config tells the sizes.
        layers: of the tower.

    Raises:
        Unsupported: the tower does not run on pixel_values alone.
    """
    config: Any = tower.config
    patch, side = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    weight = next(p for p in tower.parameters() if p.is_floating_point())
    if not isinstance(patch, int) or not isinstance(side, int) or weight.device.type == "meta":
        raise Unsupported("its config does not tell how large an image is")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in tower.modules()):
        raise Unsupported("its vision tower keeps statistics of what it sees (batch norm)")
    channels = getattr(config, "num_channels", 3)

    def run() -> None:
        # A few patches; a tower that has a table of positions wants the whole image.
        few = PATCHES * patch
        try:
            tower(pixel_values=torch.randn(1, channels, few, few).to(weight))
        except (RuntimeError, ValueError):
            tower(pixel_values=torch.randn(1, channels, side, side).to(weight))

    calls = _record(layers, run, weight.device, "pixel_values")
    tokens = max((call.hidden_states.shape[:-1].numel() for call in calls.values()), default=0)
    if tokens > MOST_PATCHES:
        raise Unsupported(f"its smallest image has {tokens} patches: too many to be tried")
    return calls


def _record(
    layers: Sequence[nn.Module], run: Callable[[], None], device: torch.device, what: str
) -> dict[nn.Module, LayerCall]:
    binding, recorders = Binding(), [_Recorder(layer) for layer in layers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        try:
            for recorder in recorders:
                binding.bind(recorder.module, recorder)
            run()
        except Unsupported:
            raise
        except (
            Exception
        ) as error:  # any model's forward may raise anything; the stock path is unharmed
            raise Unsupported(
                f"the model does not run on {what} alone ({type(error).__name__}: {error})"
            ) from error
        finally:
            binding.undo()
    return {r.module: copy.copy(r.call) for r in recorders if r.call is not None}
