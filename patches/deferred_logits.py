"""Logits that are computed when somebody reads them, and a loss that never reads them.

`DeferredLogits` is what an armed head returns: a tensor without data that knows which rows of the
head's input it stands for. A model's own forward goes on with it as with any tensor:

- what only picks rows (slices, views, the shift by one) or belongs to the loss (float(), a scale, a
  soft cap) is remembered;
- `torch.nn.functional.cross_entropy` becomes the fused kernel;
- argmax and the entropy expression (log_softmax, exp, product, sum) are answered from what the same
  pass of the kernel learnt, so that TRL's SFTTrainer logs its `entropy` and `mean_token_accuracy`
  from `outputs.logits` as ever;
- a copy (DDP makes one) is put off as well, and hooks on the gradient (FSDP puts one on every
  output) wait until a reader makes a gradient possible;
- anything else computes the real logits with the stock head, differentiably, and goes on with
  those.

So every reader gets the right values; what is recorded is that it read. No model's forward is
copied, and an auxiliary loss, a logit scale or a shift is the model's own code. The scale and the
soft cap are applied in fp32 where a 16-bit model would round in between.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lorafuse.kernels.eager import never_traced
from lorafuse.kernels.linear_cross_entropy import (
    CrossEntropyOptions,
    LinearCrossEntropy,
    linear_cross_entropy,
)
from lorafuse.kernels.lora_linear import LoraProjection

__all__ = ["DeferredLogits", "HeadCall", "LabelBound"]


class LabelBound:
    """How many of a batch's labels are not ignored: counted on the GPU ahead of the backbone.

    By the time the loss asks, the number has long arrived, and asking for it does not wait for the
    backbone. The shift by one drops labels and adds none, so it is an upper bound for the loss.

    Args:
        labels: [...] int64 on a GPU.
        ignore_index: the label that does not count.
    """

    def __init__(self, labels: Tensor, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index
        count = (labels != ignore_index).sum()
        self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
        self._count.copy_(count, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(torch.cuda.current_stream(labels.device))

    def read(self) -> int:
        """The count."""
        self._arrived.synchronize()
        return int(self._count)


class HeadCall:
    """One call of the head, put off.

    Args:
        hidden: [..., H], the head's input.
        projection: the head as it is now.
        stock: the head's own forward.
        on_read: told the name of each operation that needed the real logits.
        empty_loss_is_zero: the mean over no rows is 0 (TRL's chunked loss) and not NaN (torch's).
        label_bound: how many labels there are at most, or None where nobody has counted.

    Attributes:
        results: one for each cross-entropy that the kernel has computed.
    """

    def __init__(
        self,
        hidden: Tensor,
        projection: LoraProjection,
        stock: Callable[[Tensor], Tensor],
        on_read: Callable[[str], None],
        empty_loss_is_zero: bool = False,
        label_bound: "LabelBound | None" = None,
    ) -> None:
        self.hidden, self.projection, self.stock = hidden, projection, stock
        self.on_read, self.empty_loss_is_zero = on_read, empty_loss_is_zero
        self.label_bound = label_bound
        self.vocabulary = int(projection.weight.shape[0])
        self.results: list[LinearCrossEntropy] = []
        self._statistics: dict[tuple[float, float | None], tuple[Tensor, Tensor, Tensor]] = {}

    def logits(self) -> "DeferredLogits":
        """All of the call's logits, [..., V]."""
        leading = self.hidden.shape[:-1]
        rows = torch.arange(prod(leading), device=self.hidden.device).view(leading)
        dtype = self.hidden.dtype
        if torch.is_autocast_enabled(self.hidden.device.type):
            dtype = torch.get_autocast_dtype(self.hidden.device.type)
        return DeferredLogits(self, rows, dtype, whole=True)

    @property
    def requires_grad(self) -> bool:
        """Whether the real logits would."""
        p = self.projection
        inputs = (self.hidden, p.weight, p.bias, p.A, p.B)
        return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)

    def loss(
        self, rows: Tensor | None, labels: Tensor, options: CrossEntropyOptions, reduction: str
    ) -> Tensor:
        """The kernel's loss of `rows` (None: all) and, kept for `statistics`, its by-products."""
        most = None
        if self.label_bound is not None and self.label_bound.ignore_index == options.ignore_index:
            most = self.label_bound.read()
        result = self._cross_entropy(rows, labels, options, reduction, most)
        self.results.append(result)
        learnt = (result.row_entropy, result.row_prediction, torch.ones_like(result.labelled))
        for kept, new in zip(self._statistics_of(options), learnt, strict=True):
            old = kept if rows is None else kept[rows]
            new = new.to(kept.dtype).where(result.labelled, old)
            kept.copy_(new) if rows is None else kept.index_copy_(0, rows, new)
        if self.empty_loss_is_zero:
            empty = torch.zeros_like(result.loss)
            return torch.where(result.num_valid_tokens > 0, result.loss, empty)
        return result.loss

    def statistics(self, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
        """(entropy [T], prediction [T]) of every row, labelled or not."""
        entropy, prediction, known = self._statistics_of(options)
        missing = (~known).nonzero()[:, 0]
        if missing.numel():
            with torch.no_grad():
                # any word but the ignored one: entropy and prediction do not depend on it
                labels = torch.full_like(missing, int(options.ignore_index == 0))
                result = self._cross_entropy(missing, labels, options, "sum")
            entropy[missing] = result.row_entropy.to(entropy.dtype)
            prediction[missing] = result.row_prediction
            known.fill_(True)
        return entropy, prediction

    def _statistics_of(self, options: CrossEntropyOptions) -> tuple[Tensor, Tensor, Tensor]:
        key = (options.logit_scale, options.logit_softcap)
        if key not in self._statistics:
            rows, device = prod(self.hidden.shape[:-1]), self.hidden.device
            kept = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
            self._statistics[key] = (
                torch.empty(rows, dtype=kept, device=device),
                torch.empty(rows, dtype=torch.int64, device=device),
                torch.zeros(rows, dtype=torch.bool, device=device),
            )
        return self._statistics[key]

    def _cross_entropy(
        self,
        rows: Tensor | None,
        labels: Tensor,
        options: CrossEntropyOptions,
        reduction: str,
        max_rows: int | None = None,
    ) -> LinearCrossEntropy:
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        p = self.projection
        assert isinstance(p.weight, Tensor)  # `read_head` takes no other
        return linear_cross_entropy(
            hidden if rows is None else hidden.index_select(0, rows),
            p.weight,
            labels,
            options,
            p.bias,
            None,
            p.A,
            p.B,
            p.scale,
            "sum" if reduction == "sum" else "mean",
            max_rows,
        )


class DeferredLogits(torch.Tensor):
    """Logits, or a function of them, of some rows of a `HeadCall`.

    Attributes:
        call: where they come from.
        rows: [...] int64, rows of the call; the shape is rows.shape + [V].
        whole: `rows` is all rows, in order (of any shape).
        precision: the dtype that they say they have.
        scale, cap: the logits are `cap tanh(scale z)`, or `scale z` without a cap.
        form: "logits", "log p", "p" or "p log p".
        stock_logits: the real tensor, once it has been read; from then on it alone is used.
        hooks: on its gradient, by the id of their handle.
    """

    call: HeadCall
    rows: Tensor
    whole: bool
    precision: torch.dtype
    scale: float
    cap: float | None
    form: str
    stock_logits: Tensor | None
    hooks: OrderedDict[int, Callable[[Tensor], Tensor | None]]

    @staticmethod
    def __new__(
        cls,
        call: HeadCall,
        rows: Tensor,
        precision: torch.dtype,
        whole: bool = False,
        scale: float = 1.0,
        cap: float | None = None,
        form: str = "logits",
    ) -> "DeferredLogits":
        shape = (*rows.shape, call.vocabulary)
        self: DeferredLogits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=precision, device=rows.device
        )
        self.call, self.rows, self.whole, self.precision = call, rows, whole, precision
        self.scale, self.cap, self.form, self.stock_logits = scale, cap, form, None
        self.hooks = OrderedDict()
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def variant(self, **changes: Any) -> "DeferredLogits":
        """The same with some attributes changed."""
        names = ("call", "rows", "whole", "precision", "scale", "cap", "form")
        return DeferredLogits(**{**{name: getattr(self, name) for name in names}, **changes})

    def options(self, **more: Any) -> CrossEntropyOptions:
        """Scale and cap as the kernel writes them: c tanh(s z / c)."""
        scale = self.scale if self.cap is None else self.scale * self.cap
        return CrossEntropyOptions(logit_scale=scale, logit_softcap=self.cap, **more)

    def materialise(self, reader: str) -> Tensor:
        """The real tensor, computed by the stock head at the first call."""
        if self.stock_logits is None:
            self.call.on_read(reader)
            self.stock_logits = self._compute()
            if self.hooks and self.stock_logits.requires_grad:
                self.stock_logits.register_hook(self._run_hooks)  # type: ignore[no-untyped-call]
        return self.stock_logits

    @never_traced
    def _run_hooks(self, gradient: Tensor) -> Tensor:
        for hook in list(self.hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient

    @property
    def hook_waits(self) -> bool:
        """Whether what is made of these logits now has to pass its gradient through a hook."""
        return bool(self.hooks) and torch.is_grad_enabled()

    def _compute(self) -> Tensor:
        hidden = self.call.hidden
        if not self.whole:
            hidden = hidden.reshape(-1, hidden.shape[-1])[self.rows]
        z = self.call.stock(hidden).to(self.precision)
        z = z.view(*self.rows.shape, self.call.vocabulary)
        if self.scale != 1.0:
            z = z * self.scale
        if self.cap is not None:
            z = self.cap * torch.tanh(z)
        if self.form == "logits":
            return z
        log_p = torch.log_softmax(z, dim=-1)
        if self.form == "log p":
            return log_p
        return log_p.exp() if self.form == "p" else log_p.exp() * log_p

    @classmethod
    @never_traced
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__", "__delete__"):  # a property of torch.Tensor
            name = f"{name} {func.__self__.__name__}"
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler, first = _HANDLERS.get(name), args[0] if args else None
        if (
            handler is not None
            and isinstance(first, DeferredLogits)
            and first.stock_logits is None
            and (name in _OF_THE_GRAPH or not first.hook_waits)
        ):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result

        def real(x: DeferredLogits) -> Tensor:
            return x.materialise(name)

        return func(
            *tree_map_only(DeferredLogits, real, args),
            **tree_map_only(DeferredLogits, real, kwargs),
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Reached only from code that skips __torch_function__, as collectives do. Autograd lies
        # above this level: real logits computed here carry no gradient.
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{func} was called on logits that lorafuse has put off, past torch's overrides; "
                "set fused_cross_entropy: false for this model"
            )

        def real(x: DeferredLogits) -> Tensor:
            return x.materialise(str(func))

        args = tree_map_only(DeferredLogits, real, args)
        return func(*args, **tree_map_only(DeferredLogits, real, kwargs or {}))


def _last(dim: int, x: DeferredLogits) -> bool:
    return dim in (-1, x.rows.dim())


def _requires_grad(x: DeferredLogits) -> Any:
    return torch.is_grad_enabled() and x.call.requires_grad


def _register_hook(x: DeferredLogits, hook: Callable[[Tensor], Tensor | None]) -> Any:
    handle = RemovableHandle(x.hooks)
    x.hooks[handle.id] = hook
    return handle


def _cast(x: DeferredLogits, dtype: torch.dtype) -> Any:
    if x.form != "logits" or not dtype.is_floating_point:
        return NotImplemented
    if torch.finfo(dtype).bits < torch.finfo(x.precision).bits:
        return NotImplemented
    return x.variant(precision=dtype)


def _float(x: DeferredLogits) -> Any:
    return _cast(x, torch.float32)


def _to(x: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    try:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return NotImplemented
    if device is not None and torch.empty(0, device=device).device != x.rows.device:
        return NotImplemented
    return x if dtype is None else _cast(x, dtype)


def _view(x: DeferredLogits, *sizes: Any) -> Any:
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    *leading, last = sizes
    if last == -1 and -1 not in leading and prod(leading) == x.rows.numel():
        last = x.call.vocabulary
    if last != x.call.vocabulary:
        return NotImplemented
    return x.variant(rows=x.rows.reshape(leading))


def _flatten(x: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = x.rows.dim()
    if end_dim % (last + 1) >= last:
        return NotImplemented
    return x.variant(rows=x.rows.flatten(start_dim % (last + 1), end_dim % (last + 1)))


def _index(x: DeferredLogits, index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]

    def width(item: Any) -> int:
        if item is None:
            return 0
        if isinstance(item, bool):
            raise TypeError
        return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1

    try:
        if any(item is Ellipsis for item in items):
            # the last dimension is taken by what follows the dots
            if items[-1] != slice(None):
                return NotImplemented
            items.pop()
        elif sum(map(width, items)) > x.rows.dim():
            if items.pop() != slice(None):
                return NotImplemented
        return x.variant(rows=x.rows[tuple(items)], whole=False)
    except TypeError:
        return NotImplemented


def _split(x: DeferredLogits, split_size: Any, dim: int = 0) -> Any:
    if _last(dim, x):
        return NotImplemented
    parts = torch.split(x.rows, split_size, dim)
    return tuple(x.variant(rows=rows, whole=False) for rows in parts)


def _scaled(x: DeferredLogits, factor: float) -> Any:
    if x.form != "logits":
        return NotImplemented
    if x.cap is None:
        return x.variant(scale=x.scale * factor)
    return x.variant(cap=x.cap * factor) if factor > 0 else NotImplemented


def _mul(x: DeferredLogits, other: Any) -> Any:
    if isinstance(other, int | float):
        return _scaled(x, float(other))
    if (
        isinstance(other, DeferredLogits)
        and {x.form, other.form} == {"p", "log p"}
        and x.rows is other.rows
        and (x.call, x.scale, x.cap) == (other.call, other.scale, other.cap)
    ):
        return x.variant(form="p log p")
    return NotImplemented


def _div(x: DeferredLogits, other: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(other, int | float) or not other:
        return NotImplemented
    return _scaled(x, 1.0 / other)


def _tanh(x: DeferredLogits) -> Any:
    if x.form != "logits" or x.cap is not None:
        return NotImplemented
    return x.variant(cap=1.0)


def _softmax_form(form: str) -> Callable[..., Any]:
    def handler(
        x: DeferredLogits, dim: int | None = None, _stacklevel: Any = 3, dtype: Any = None
    ) -> Any:
        # torch.nn.functional's third argument is a stack level, torch's own is the dtype
        if x.form != "logits" or dim is None or not _last(dim, x):
            return NotImplemented
        if dtype is not None or not isinstance(_stacklevel, int):
            return NotImplemented
        return x.variant(form=form)

    return handler


def _exp(x: DeferredLogits) -> Any:
    return x.variant(form="p") if x.form == "log p" else NotImplemented


def _sum(x: DeferredLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if x.form != "p log p" or not isinstance(dim, int) or not _last(dim, x) or keepdim:
        return NotImplemented
    return -x.call.statistics(x.options())[0][x.rows]


def _argmax(x: DeferredLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    if x.form != "logits" or dim is None or not _last(dim, x) or keepdim:
        return NotImplemented
    return x.call.statistics(x.options())[1][x.rows]


def _cross_entropy(
    x: DeferredLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if (
        x.form != "logits"
        or x.rows.dim() != 1
        or type(target) is not Tensor
        or target.shape != x.rows.shape
        or target.dtype != torch.int64
        or not (weight is size_average is reduce is None)
        or reduction not in ("mean", "sum")
    ):
        return NotImplemented
    options = x.options(ignore_index=ignore_index, label_smoothing=label_smoothing)
    loss = x.call.loss(None if x.whole else x.rows, target, options, reduction)
    return loss.to(x.precision)


_METADATA = frozenset(
    [f"__get__ {name}" for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta")]
    + ["__hash__", "__len__", "dim", "is_floating_point", "nelement", "numel", "size"]
)

# Asked of the tensor as a node of the graph.
_OF_THE_GRAPH: dict[str, Callable[..., Any]] = {
    "__get__ requires_grad": _requires_grad,
    "__get__ grad_fn": lambda x: None,  # there is none yet
    "__get__ _base": lambda x: None,
    "register_hook": _register_hook,
}

_HANDLERS: dict[str, Callable[..., Any]] = {
    **_OF_THE_GRAPH,
    "__repr__": lambda x, **_: f"DeferredLogits({x.form}, {tuple(x.shape)}, {x.precision})",
    "float": _float,
    "to": _to,
    "clone": lambda x, **_: x.variant(),
    "contiguous": lambda x: x,
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "__getitem__": _index,
    "split": _split,
    "mul": _mul,
    "__mul__": _mul,
    "__rmul__": _mul,
    "div": _div,
    "true_divide": _div,
    "__truediv__": _div,
    "tanh": _tanh,
    "log_softmax": _softmax_form("log p"),
    "softmax": _softmax_form("p"),
    "exp": _exp,
    "sum": _sum,
    "argmax": _argmax,
    "cross_entropy": _cross_entropy,
}
