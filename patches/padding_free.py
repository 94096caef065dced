"""A padded batch goes through the model's layers without its padding.

Rows of unequal length are padded to the longest, and stock computes every product for the padding
as well. Here the backbone is called with the real tokens alone, one row behind the other:

    input_ids [B, S], attention_mask [B, S]    ->    input_ids [1, T], position_ids [1, T]

which is how transformers takes documents packed into one row: positions that do not go on tell
where a document ends. Each token keeps the position that it had. The last hidden states are put
back to [B, S, H], with zeros where padding was; labels, head and loss see the shapes that they
always see. So every layer profits, of whatever class, and none has to know.

T is rounded up to a multiple of `MULTIPLE` with padding, behind all that is real.

Whether a model keeps the documents of one row apart is its own code's doing. It is tried before:
a padded batch and the same without its padding must give the same hidden states, and those of a
document must not change with another document's words. A call that cannot be served runs padded,
with the reason counted:

    caches, collected hidden states or router logits are asked for
    rows that have holes, or hold several documents already
    padding that has to predict a label: a caller that left labels on it, or padding in front of a
    first token that is labelled
    little padding (`WORTH`): attention within documents is slower than over whole rows

(The idea is known as padding-free training; in transformers it needs FlashAttention 2 and a
collator that packs.)
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.patches.bind import KV_CACHES, TracedForward, Unsupported
from lorafuse.patches.hooks import collects_hidden_states
from lorafuse.patches.label_places import LabelPlaces
from lorafuse.patches.probe import TOKENS, as_before, word_table
from lorafuse.patches.weights import is_sharded

__all__ = ["OPERATION", "PaddingFree", "verify_padding_free"]

OPERATION = "padding_free"
# Of the places in a batch, at most so many may be real tokens.
WORTH = 0.85
MULTIPLE = 64
# transformers makes a bool mask [T, T] of the documents.
MOST_TOKENS = 2**14
# Of the hidden states' size.
_LIMIT, _LIMIT_16_BIT = 1e-4, 5e-2
_INPUTS = ("input_ids", "inputs_embeds")
_HANDLED = (*_INPUTS, "attention_mask", "position_ids", "cache_position")
_COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass(frozen=True, eq=False)
class Rows:
    """Which places of a padded batch are computed.

    Attributes:
        shape: (B, S) of the batch.
        index: [T] int64, the places among B S; real tokens first, then padding that fills up.
        real: how many are real.
    """

    shape: tuple[int, int]
    index: Tensor
    real: int

    def packed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments for the tokens alone."""
        rows, length = self.shape
        found = {
            k: v for k, v in arguments.items() if k not in ("attention_mask", "cache_position")
        }
        for name in _INPUTS:
            given = arguments.get(name)
            if given is not None:
                found[name] = given.flatten(0, 1).index_select(0, self.index)[None]
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=self.index.device)[None]
        positions = positions.expand(rows, length).reshape(-1)[self.index]
        return {**found, "attention_mask": None, "position_ids": positions[None]}

    def spread(self, hidden: Tensor) -> Tensor:
        """[B, S, H] of [1, T, H]; 0 where nothing was computed."""
        rows, length = self.shape
        whole = hidden.new_zeros(rows * length, hidden.shape[-1])
        real = hidden[0, : self.real]
        return whole.index_copy(0, self.index[: self.real], real).view(rows, length, -1)


def read_rows(mask: Tensor, positions: Tensor | None, predicts: Tensor | None = None) -> Rows:
    """The places of a batch that are real.

    Waits for the GPU once, at the beginning of a forward pass.

    Args:
        mask: [B, S], 0 at padding.
        positions: [B or 1, S], of the caller, or None.
        predicts: [B, S] bool, places whose hidden states a loss reads; None: not known.

    Raises:
        Unsupported: there is nothing to gain, a row is not one document, or padding is read.
    """
    rows, length = mask.shape
    real = mask.bool()
    goes_on = torch.ones_like(real)
    if positions is not None:
        goes_on[:, :-1] = positions.diff(dim=-1) == 1
    if predicts is None:  # padding in front of a token would predict it, behind it nothing
        predicts = torch.nn.functional.pad(real[:, 1:], (0, 1))
    real, goes_on, predicts = torch.stack([real, goes_on, predicts]).cpu()
    count = int(real.sum())
    if not 0 < count <= WORTH * rows * length:
        raise Unsupported(f"more than {WORTH:.0%} of the batch are tokens, or none is")
    if count > MOST_TOKENS:
        raise Unsupported(f"a batch has more than {MOST_TOKENS} tokens")
    ends = real & ~torch.nn.functional.pad(real[:, 1:], (0, 1))
    if (ends.sum(1) > 1).any():
        raise Unsupported("a row has padding between its tokens")
    if not (goes_on | ends | ~real).all():
        raise Unsupported("a row's positions do not go on from token to token")
    if (predicts & ~real).any():
        raise Unsupported("padding has to predict a label")
    index = real.flatten().nonzero()[:, 0]
    # Of the padding, the last columns: so the largest position of the batch is among them, by which
    # some models choose RoPE's frequencies.
    padding = (~real).T.nonzero().flip(0)[: MULTIPLE - count % MULTIPLE]
    spare = padding[:, 1] * length + padding[:, 0]
    return Rows((rows, length), torch.cat([index, spare]).to(mask.device), count)


class PaddingFree(TracedForward):
    """The forward of a backbone on the real tokens of a padded batch."""

    operations = (OPERATION,)

    def __init__(self, module: nn.Module, places: LabelPlaces) -> None:
        super().__init__(module)
        self.places = places

    def call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            arguments = self.arguments(args, kwargs)
            self.check(arguments)
            mask = arguments["attention_mask"]
            rows = read_rows(mask, arguments.get("position_ids"), self.places.predicts(mask))
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, *args, **kwargs)
        self.calls += 1
        return run(self.stock, rows, arguments)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises Unsupported where the call asks for what has the padded shape."""
        mask = arguments.get("attention_mask")
        if not self.module.training:
            raise Unsupported("the model is evaluated")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise Unsupported("it was called without an attention mask [rows, tokens]")
        config = getattr(self.module, "config", None)
        uses_cache = arguments.get("use_cache")
        if getattr(config, "use_cache", False) if uses_cache is None else uses_cache:
            raise Unsupported("it fills a KV cache: pass use_cache=False")
        if any(arguments.get(name) is not None for name in KV_CACHES):
            raise Unsupported("a KV cache is in use")
        if collects_hidden_states() or any(
            arguments.get(name) or getattr(config, name, False) for name in _COLLECTED
        ):
            raise Unsupported("hidden states, attention weights or router logits are asked for")
        given = next((arguments[n] for n in _INPUTS if arguments.get(n) is not None), None)
        if not isinstance(given, Tensor) or given.shape[:2] != mask.shape:
            raise Unsupported(
                "it was called without input_ids or inputs_embeds of the mask's shape"
            )
        positions = arguments.get("position_ids")
        if positions is not None and (
            not isinstance(positions, Tensor)
            or positions.dim() != 2
            or positions.shape[0] not in (1, mask.shape[0])
            or positions.shape[1] != mask.shape[1]
        ):
            raise Unsupported("its positions are not of the mask's shape")
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.dim() and name not in _HANDLED:
                raise Unsupported(f"it was called with {name}, whose rows are not known")


def run(forward: Any, rows: Rows, arguments: Mapping[str, Any]) -> Any:
    """The backbone's outputs, of the padded shape."""
    outputs = forward(**rows.packed(arguments))
    whole = rows.spread(outputs[0])
    if isinstance(outputs, tuple):
        return (whole, *outputs[1:])
    outputs["last_hidden_state"] = whole
    return outputs


def verify_padding_free(backbone: nn.Module) -> str | None:
    """Why `backbone` is not to be called so, or None; it is tried as it stands, in evaluation.

    Three forward passes of a few tokens; the state of the random numbers, buffers and modes are as
    before afterwards.
    """
    names = set(inspect.signature(backbone.forward).parameters)
    for name in ("attention_mask", "position_ids", "use_cache"):
        if name not in names:
            return f"{type(backbone).__name__} takes no {name}"
    if any(is_sharded(p) or hasattr(p, "ds_id") for p in backbone.parameters()):
        return "its weights are sharded: fuse before the model is wrapped"
    try:
        return _tried(backbone)
    except Unsupported as unsupported:
        return unsupported.reason
    except Exception as error:  # any model's forward may raise anything
        return f"it does not run on packed tokens ({type(error).__name__}: {error})"


def _tried(backbone: nn.Module) -> str | None:
    table = word_table(backbone)
    device = table.weight.device
    if device.type == "meta":
        raise Unsupported("the model's weights are not here yet (meta device)")
    length = TOKENS[1]
    generator = torch.Generator().manual_seed(0)
    few = min(100, table.num_embeddings)
    ids = torch.randint(0, few, (3, length), generator=generator).to(device)
    others = ids.clone()
    others[0] = (ids[0] + 1 + few // 2) % few
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    mask[1, 5:] = 0
    rows = read_rows(mask, None)
    with torch.no_grad(), as_before(backbone, []), _evaluated(backbone):

        def hidden(words: Tensor, packed: bool) -> Tensor:
            arguments = {"input_ids": words, "attention_mask": mask, "use_cache": False}
            outputs = run(backbone, rows, arguments) if packed else backbone(**arguments)
            found: Tensor = outputs[0]
            return found.double() * mask[..., None]

        padded, packed, changed = hidden(ids, False), hidden(ids, True), hidden(others, True)
    limit = _LIMIT if _is_exact(backbone) else _LIMIT_16_BIT
    if not (packed - padded).norm() <= limit * padded.norm():
        return "its hidden states are others without the padding"
    if not (changed[1:] - packed[1:]).norm() <= limit * packed[1:].norm():
        return "it lets documents of one row see each other"
    if not (changed[0] - packed[0]).norm() > limit * packed[0].norm():
        return "its hidden states do not depend on its words"
    return None


def _is_exact(backbone: nn.Module) -> bool:
    """Whether it computes in fp32 or better throughout."""
    return all(p.dtype in (torch.float32, torch.float64) for p in backbone.parameters())


@contextmanager
def _evaluated(backbone: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
