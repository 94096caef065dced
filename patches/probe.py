"""Finds out with which arguments a model calls its decoder layers.

Every layer is replaced, for a few forwards of a few tokens (of a vision tower: a small image), by a
recorder that returns its input: no weight is used but the embedding's, nothing is kept, and the
instances are as before afterwards.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorafuse.patches.bind import Binding, FusedForward, Unsupported

# Batch and sequence: small, but longer than a head's or a window's edge case of one.
TOKENS = 2, 12
# A side of the image that a vision tower is tried with.
PATCHES = 4
# Rows of the table that stands in for that of words.
FEW_WORDS = 128
# What a layer is tried with at most: stock attention may hold the square of it for each head.
MOST_PATCHES = 1024


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One recorded call: everything but the hidden states [B, S, K]."""

    hidden_states: Tensor
    kwargs: dict[str, Any]
    # [B, S]: the tokens that are not padding; None: all.
    kept: Tensor | None = None


class _Recorder(FusedForward):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.seen: LayerCall | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments(args, kwargs)
        h = arguments.pop("hidden_states", None)
        if not isinstance(h, Tensor):
            raise Unsupported("its decoder layer takes no hidden_states")
        self.seen = LayerCall(h.detach().clone(), _axes_apart(arguments))
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


Calls = dict[nn.Module, LayerCall]
# Elements of a buffer that is copied while a model is probed: of RoPE's frequencies, not of tables.
_SMALL = 1 << 20


def record_other_calls(backbone: nn.Module, layers: Sequence[nn.Module]) -> dict[str, Calls]:
    """The calls of each of `layers` in forwards of other kinds, those that the model takes.

    With padding behind the first row, and with two documents packed into each row. It is a model
    that `record_layer_calls` has recorded.
    """
    positions = _positions(backbone)
    mask = torch.ones_like(positions)
    mask[0, TOKENS[1] - 5 :] = 0
    kinds: dict[str, dict[str, Tensor]] = {
        "with padding": {"attention_mask": mask},
        "with packed documents": {"position_ids": positions % 7},
    }
    found = {}
    for what, inputs in kinds.items():
        try:
            calls = record_layer_calls(backbone, layers, **inputs)
        except Unsupported:  # a model that takes no such input
            continue
        if "attention_mask" in inputs:
            calls = {m: replace(call, kept=mask.bool()) for m, call in calls.items()}
        found[what] = calls
    return found


def last_position(backbone: nn.Module) -> int:
    """The end of the positions that the model's config allows for; 0 where it says nothing."""
    config: Any = getattr(backbone, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    last = getattr(config, "max_position_embeddings", None)
    return last if isinstance(last, int) and last > 2 * TOKENS[1] else 0


def record_far_calls(backbone: nn.Module, layers: Sequence[nn.Module], end: int) -> Calls:
    """As `record_layer_calls`, with the last positions before `end`; {} where it takes none.

    On a copy on the CPU, without the layers and with a small table of words: an index beyond a
    table of positions is an exception there, and the end of the process on a GPU.
    """
    try:
        replica, stand_ins = _without_weights(backbone, layers)
        positions = _positions(replica) + end - TOKENS[1]
        recorded = record_layer_calls(replica, stand_ins, position_ids=positions)
    except Exception:  # any model may refuse to be copied, or to run alone
        return {}
    device = word_table(backbone).weight.device
    return {
        layer: _moved(recorded[stand_in], device)
        for layer, stand_in in zip(layers, stand_ins, strict=True)
        if stand_in in recorded
    }


class _Called:
    """A forward of this signature; a recorder stands in its place before it is called."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _StandIn(nn.Module):
    """Where a layer was: without parts of its own, what is asked of it is the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer
        self.__dict__["forward"] = _Called(inspect.signature(layer.forward))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


def _without_weights(
    backbone: nn.Module, layers: Sequence[nn.Module]
) -> tuple[nn.Module, list[nn.Module]]:
    """(a copy of `backbone` on the CPU, what stands in it for each of `layers`)."""
    stand_ins: list[nn.Module] = [_StandIn(layer) for layer in layers]
    memo: dict[int, Any] = {id(m): s for m, s in zip(layers, stand_ins, strict=True)}
    inside = {id(m) for layer in layers for m in layer.modules()}
    holders = {id(m) for m in backbone.modules() if any(id(c) in inside for c in m.modules())}
    words = word_table(backbone)
    memo[id(words)] = nn.Embedding(FEW_WORDS, words.embedding_dim, dtype=words.weight.dtype)
    for module in backbone.modules():  # towers of vision, and the like
        if id(module) not in holders | inside | set(memo):
            large = sum(p.numel() for p in module.parameters()) > _SMALL
            if large:
                memo[id(module)] = nn.Identity()
    return copy.deepcopy(backbone, memo).cpu(), stand_ins


def _moved(call: LayerCall, device: torch.device) -> LayerCall:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    kwargs = {name: move(value) for name, value in call.kwargs.items()}
    return LayerCall(call.hidden_states.to(device), kwargs)


def word_table(backbone: Any) -> nn.Embedding:
    """The table of words: a vision tower may have tables of its own, and stand in front."""
    try:
        found = backbone.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    found = found.get_base_layer() if isinstance(found, BaseTunerLayer) else found
    for module in (found, *backbone.modules()):
        if isinstance(module, nn.Embedding):
            return module
    raise Unsupported("the model has no token embedding")


def _positions(backbone: nn.Module) -> Tensor:
    device = word_table(backbone).weight.device
    return torch.arange(TOKENS[1], device=device).expand(TOKENS[0], -1)


@contextmanager
def as_before(backbone: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back what a forward changes outside the layers, as RoPE's frequencies of long rows."""
    inside = {id(m) for layer in layers for m in layer.modules()}
    outside = [m for m in backbone.modules() if id(m) not in inside]
    before = [
        (
            module,
            {k: v for k, v in module.__dict__.items() if _is_value(v)},
            dict(module._buffers),
            {k: b.clone() for k, b in module._buffers.items() if b is not None and _is_small(b)},
        )
        for module in outside
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, contents in before:
            for name in [k for k, v in module.__dict__.items() if _is_value(v)]:
                # transformers marks modules by private names
                if name not in attributes and not name.startswith("_"):
                    del module.__dict__[name]
            module.__dict__.update(attributes)
            for name in set(module._buffers) - set(buffers):
                del module._buffers[name]
            module._buffers.update(buffers)
            for name, content in contents.items():
                buffer = buffers[name]
                if buffer is not None and not torch.equal(buffer, content):
                    buffer.copy_(content)


def _is_value(value: object) -> bool:
    return value is None or isinstance(value, int | float | str | Tensor)


def _is_small(buffer: Tensor) -> bool:
    return not buffer.is_meta and buffer.numel() <= _SMALL


def record_layer_calls(backbone: nn.Module, layers: Sequence[nn.Module], **inputs: Tensor) -> Calls:
    """The call of each of `layers` in one forward of `backbone` on a few random tokens.

    Args:
        backbone: the model without its head.
        layers: modules of it that take hidden_states.
        **inputs: what it gets beside input_ids.

    Raises:
        Unsupported: the model does not run on input_ids alone.
    """
    embedding = word_table(backbone)
    device = embedding.weight.device
    if device.type == "meta":
        raise Unsupported("the model's weights are not here yet (meta device)")

    def run() -> None:
        ids = torch.randint(0, min(100, embedding.num_embeddings), TOKENS, device=device)
        backbone(input_ids=ids, use_cache=False, **inputs)

    return _record(backbone, layers, run, device, "input_ids")


def record_vision_calls(tower: nn.Module, layers: Sequence[nn.Module]) -> Calls:
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

    calls = _record(tower, layers, run, weight.device, "pixel_values")
    tokens = max((call.hidden_states.shape[:-1].numel() for call in calls.values()), default=0)
    if tokens > MOST_PATCHES:
        raise Unsupported(f"its smallest image has {tokens} patches: too many to be tried")
    return calls


def _record(
    model: nn.Module,
    layers: Sequence[nn.Module],
    run: Callable[[], None],
    device: torch.device,
    what: str,
) -> Calls:
    """The calls of `layers` while `run` calls `model`, of which it gives `what` alone."""
    binding, recorders = Binding(), [_Recorder(layer) for layer in layers]
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.no_grad(),
        as_before(model, layers),
    ):
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
    return {r.module: copy.copy(r.seen) for r in recorders if r.seen is not None}
