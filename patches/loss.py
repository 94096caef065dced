"""The fused loss of a causal LM: its own forward, with a head that puts its logits off.

`FusedCausalLoss` stands on the causal LM's instance. For the time of one forward it arms the head:
the head returns `DeferredLogits`, the model's own code goes on with them, and where that code calls
`cross_entropy` the fused kernel computes loss and d(hidden) in chunks. `outputs.logits` stays
readable: whoever reads it gets what stock gives. The shift, num_items_in_batch, an auxiliary loss
and the output
class are all the model's own.

A trainer may have replaced the instance's forward before by one that never calls the head, as TRL's
chunked loss does. If its output is {loss, num_valid_tokens, num_correct_tokens, entropy_sum} and no
logits, the class's forward is run instead, and its loss and the kernel's by-products are given in
that very class.

A trainer may also ask the forward for log-probabilities (`log_probs`).

The stock forward runs where there are no labels (generate, DPO, TRL's dft) or a KV cache.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast

from lorafuse.kernels.eager import not_traced_itself, set_tracer, tracing_again
from lorafuse.kernels.lora_linear import LoraProjection
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.bind import KV_CACHES, FusedForward, Unsupported
from lorafuse.patches.deferred_logits import DeferredLogits, HeadCall, LabelBound
from lorafuse.patches.exact_fp32 import exact_fp32
from lorafuse.patches.hooks import has_live_hooks
from lorafuse.patches.label_places import LabelPlaces
from lorafuse.patches.log_probs import ARGUMENT, forward_with
from lorafuse.patches.weights import WeightReader, check_plain

__all__ = [
    "CausalHead",
    "FusedCausalLoss",
    "recognise_causal_head",
    "verify_causal_loss",
    "verify_log_probs",
]

_BY_PRODUCTS = ("num_valid_tokens", "num_correct_tokens", "entropy_sum")
_SHAPE = (2, 9)
_INPUT = "gradient of the hidden states"
_TRLS = ("loss", "log_probs", "entropy", "mean_logits")  # of its fused head
_COUNTS = ("num_correct_tokens", "hits")


@dataclass(frozen=True, eq=False)
class ReplacedForward:
    """What a forward gives that a trainer has put on the instance and that never calls the head."""

    output_class: type[CausalLMOutputWithPast]
    empty_loss_is_zero: bool  # the mean loss of a batch without labels; torch gives NaN


@dataclass(frozen=True, eq=False)
class CausalHead:
    """A causal LM, its backbone and the head on top.

    Attributes:
        module: the causal LM.
        backbone: gives the hidden states.
        head: what `get_output_embeddings()` returns: linear, LoRA-adapted or in `modules_to_save`.
        replaced: set where the forward on the instance is not the model's own.
    """

    module: nn.Module
    backbone: nn.Module
    head: nn.Module
    replaced: ReplacedForward | None = None


class HeadWeight(WeightReader):
    """A float weight that may be trained: the kernel gives its gradient."""

    name = "float"

    def read(self) -> Tensor:
        weight: Tensor = self.layer.weight
        check_plain(weight, "the head's weight")
        return weight


def _float_head(layer: nn.Module) -> WeightReader | None:
    """A weight format like `float_weight` that a trained head has as well."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return None
    if not layer.weight.is_floating_point():
        return None
    return HeadWeight(layer)


def _reader(head: nn.Module) -> LinearReader:
    """Raises Unsupported where the head is no linear layer with a float weight."""
    if isinstance(head, ModulesToSaveWrapper):
        names = [] if head.disable_adapters else head.active_adapters
        if len(names) > 1:
            raise Unsupported("several adapters of the head are active")
        saved = [head.modules_to_save[name] for name in names if name in head.modules_to_save]
        head = saved[0] if saved else head.original_module
    base = head.get_base_layer() if isinstance(head, LoraLayer) else head
    if isinstance(base, nn.Module) and _float_head(base) is None:
        raise Unsupported(f"the head is a {type(base).__name__}, not a float linear layer")
    return LinearReader(head, (_float_head,))


def _projection(reader: LinearReader, hidden: Tensor) -> LoraProjection:
    projection = reader.projection(hidden)
    if projection.dropout:
        raise Unsupported("LoRA dropout on the head draws a mask of its own")
    return projection


class _Swap:
    """Puts a forward on an instance for a while, and back exactly what was there."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.had = "forward" in self.module.__dict__
        self.previous = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = self.forward

    def __exit__(self, *_: Any) -> None:
        if self.had:
            self.module.__dict__["forward"] = self.previous
        else:
            del self.module.__dict__["forward"]


class FusedCausalLoss(FusedForward):
    """The forward of a causal LM whose loss is computed without the logits of the batch.

    Evaluation is fused as well: what wants its logits (`predict`, `compute_metrics`) reads real
    ones, and what wants the loss alone never holds them.
    """

    operations: ClassVar[tuple[str, ...]] = ("cross_entropy",)

    def __init__(self, head: CausalHead, places: LabelPlaces | None = None) -> None:
        super().__init__(head.module)
        self.head, self.places = head, places or LabelPlaces()
        parameters = list(self.__signature__.parameters)
        self._position = {name: i for i, name in enumerate(parameters)}
        # Why the log-probabilities that a trainer asks for are its own; "" where they need not be.
        self.no_log_probs = ""

    @not_traced_itself
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Logits that are put off cannot be traced; the backbone is, as far as it is not fused.
        tracer = set_tracer(None)
        try:
            if tracer is None:
                return self.call(*args, **kwargs)
            backbone = self.head.backbone
            with _Swap(backbone, tracing_again(tracer, backbone.forward)):
                return self.call(*args, **kwargs)
        finally:
            set_tracer(tracer)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        labels = [self._argument(name, args, kwargs) for name in ("labels", "shift_labels")]
        with self.places.told(*labels):
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(ARGUMENT):
            if self.no_log_probs:
                return self.fall_back(self.no_log_probs, *args, **kwargs)
            return self.log_probs(*args, **kwargs)
        reason = self._why_stock(args, kwargs)
        if reason is None:
            try:
                return self.run(*args, **kwargs)
            except Unsupported as unsupported:
                reason = unsupported.reason
        return self.fall_back(reason, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The fused forward.

        Raises:
            Unsupported: the head cannot be read as it is now, or the loss came about otherwise.
        """
        replaced = self.head.replaced
        calls: list[HeadCall] = []
        forward = self.stock
        if replaced is not None:
            # What the trainer's forward never passes on: training keeps no KV cache.
            kwargs.pop("use_cache", None)
            kwargs["use_cache"] = False
            forward = type(self.module).forward.__get__(self.module)
            count = kwargs.get("num_items_in_batch")
            if replaced.empty_loss_is_zero and count is not None:
                # No labels anywhere: 0 / 0 in the model's own code, but 0 in the replaced forward.
                at_least_one = count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
                kwargs["num_items_in_batch"] = at_least_one
        empty_loss_is_zero = replaced is not None and replaced.empty_loss_is_zero
        with self._armed(calls, empty_loss_is_zero, self._label_bound(args, kwargs)):
            outputs = forward(*args, **kwargs)
        results = [result for call in calls for result in call.results]
        if not results and replaced is None:
            # The model's own code has read the logits to compute the loss: `_read` has counted it.
            return outputs
        if replaced is None:
            self.calls += 1
            return outputs
        if len(results) != 1:
            raise Unsupported(f"the loss consists of {len(results)} cross-entropies, not one")
        self.calls += 1
        fields = {f.name: outputs.get(f.name) for f in dataclasses.fields(replaced.output_class)}
        fields.update({name: getattr(results[0], name) for name in _BY_PRODUCTS})
        return replaced.output_class(**{**fields, "logits": None})

    def log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of TRL's fused head, with the kernel where it computes log-probabilities."""
        found = forward_with(self.stock, self._log_probs_fall_back)
        if found is None:
            return self.fall_back("the trainer's fused head is not known", *args, **kwargs)
        forward, own = found
        outputs = forward(*args, **kwargs)
        self.calls += own.served > 0
        return outputs

    def _log_probs_fall_back(self, reason: str) -> None:
        self.stock_calls[reason] += 1

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self._position.get(name, len(args))
        return args[position] if position < len(args) else kwargs.get(name)

    def _label_bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LabelBound | None:
        # Of the loss that is known to use just these labels, shifted or not.
        labels = self._argument("shift_labels", args, kwargs)
        if labels is None:
            labels = self._argument("labels", args, kwargs)
        function = getattr(self.module, "loss_function", None)
        if getattr(function, "__name__", "") != "ForCausalLMLoss":
            return None
        return LabelBound(labels) if isinstance(labels, Tensor) and labels.is_cuda else None

    def _why_stock(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if self._argument("labels", args, kwargs) is None:
            return "no labels were passed: the caller wants logits"
        if any(self._argument(name, args, kwargs) is not None for name in KV_CACHES):
            return "a KV cache is in use"
        if has_live_hooks(self.head.head):
            return "a hook on the head has to run"
        return None

    @contextmanager
    def _armed(
        self, calls: list[HeadCall], empty_loss_is_zero: bool, label_bound: LabelBound | None
    ) -> Iterator[None]:
        head = self.head.head
        reader, stock = _reader(head), head.forward

        def put_off(hidden: Tensor) -> DeferredLogits:
            projection = _projection(reader, hidden)
            calls.append(
                HeadCall(hidden, projection, stock, self._read, empty_loss_is_zero, label_bound)
            )
            return calls[-1].logits()

        with _Swap(head, put_off):
            yield

    def _read(self, operation: str) -> None:
        self.stock_calls[f"{operation} read the logits"] += 1


def recognise_causal_head(model: nn.Module) -> CausalHead | str:
    """The outermost causal LM in `model`, or why there is none whose loss could be fused.

    Its forward is tried on a few hidden states, to learn whether it calls the head.
    """
    for module in model.modules():
        # Asked of the class: PEFT's wrappers hand every attribute of their base model on.
        if not hasattr(type(module), "base_model_prefix"):
            continue
        head = module.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, nn.Module):
            break
    else:
        return f"{type(model).__name__} has no output embeddings (get_output_embeddings)"
    backbone = _backbone(module, head)
    if backbone is None or head not in set(module.modules()):
        return f"{type(module).__name__} is not a backbone with a head on top"
    if isinstance(module.forward, FusedForward):
        return "it is fused already"
    try:
        _reader(head)
    except Unsupported as unsupported:
        return unsupported.reason
    found = CausalHead(module, backbone, head)
    try:
        return _look_at_forward(found)
    except Unsupported as unsupported:
        return unsupported.reason
    except Exception as error:  # any model's forward may raise anything on inputs it never sees
        return f"its forward could not be tried ({type(error).__name__}: {error})"


def _backbone(module: nn.Module, head: nn.Module) -> nn.Module | None:
    """What gives the hidden states: the causal LM's own, or that of the one within it.

    An image-text class may hold a whole causal LM, whose logits it takes for the loss.
    """
    for holder in module.modules():
        if not hasattr(type(holder), "base_model_prefix"):
            continue
        if holder.get_output_embeddings() is not head:  # type: ignore[operator]
            continue
        for name in (getattr(holder, "base_model_prefix", ""), "model"):
            found = getattr(holder, name or " ", None)
            if isinstance(found, nn.Module) and head not in set(found.modules()):
                return found
    return None


@dataclass
class _BackboneOutput(MoeModelOutputWithPast):
    """Hidden states alone; whatever else a forward looks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


@dataclass
class _Trial:
    """Runs a causal LM's forward on random hidden states in its backbone's stead."""

    hidden: Tensor
    vocabulary: int
    generator: torch.Generator
    fixed: dict[str, Any]

    def __call__(self, forward: Callable[..., Any], labels: Tensor, **more: Any) -> Any:
        return forward(labels=labels, **self.fixed, **more)

    def labels(self) -> Tensor:
        """Random words, some of them ignored, at a start and at an end."""
        labels = torch.randint(
            self.vocabulary, _SHAPE, generator=self.generator, device=self.hidden.device
        )
        labels[0, :4] = -100
        labels[1, -2:] = -100
        return labels


@contextmanager
def _trial(head: CausalHead) -> Iterator[_Trial]:
    """Parameters, gradients, buffers, forwards, random state and TF32 are as before afterwards."""
    reader = _reader(head.head)
    weight = reader.weight.read()
    assert isinstance(weight, Tensor)
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (*_SHAPE, reader.in_features)
    hidden = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
    hidden.requires_grad_()
    ids = torch.zeros(_SHAPE, dtype=torch.int64, device=weight.device)
    fixed: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "output_router_logits" in inspect.signature(head.module.forward).parameters:
        fixed["output_router_logits"] = False  # there is no router in this trial

    def backbone(*_: Any, **__: Any) -> _BackboneOutput:
        return _BackboneOutput(last_hidden_state=hidden)  # type: ignore[arg-type]

    with (
        torch.random.fork_rng([weight.device] if weight.is_cuda else []),
        torch.enable_grad(),
        torch.autocast(weight.device.type, enabled=False),
        exact_fp32(),
        _Swap(head.backbone, backbone),
    ):
        yield _Trial(hidden, reader.out_features, generator, fixed)


def _look_at_forward(head: CausalHead) -> CausalHead:
    called: list[int] = []
    own = head.head.forward

    def spy(hidden: Tensor) -> Any:
        called.append(1)
        return own(hidden)

    with _trial(head) as run, torch.no_grad():
        labels = run.labels()
        with _Swap(head.head, spy):
            outputs = run(head.module.forward, labels)
        name = type(head.module).__name__
        if getattr(outputs, "loss", None) is None:
            raise Unsupported(f"{name} returns no loss for labels")
        if called:
            return head
        if "forward" not in head.module.__dict__:
            raise Unsupported(f"{name} does not call its output embeddings")
        names = {field.name for field in dataclasses.fields(outputs)}
        if hasattr(head.module, "_original_forward") or not names.issuperset(_BY_PRODUCTS):
            raise Unsupported(f"the forward of {name} was replaced by one that is not known")
        empty = run(head.module.forward, torch.full_like(labels, -100))
        zero = bool(empty.loss == 0)
    return dataclasses.replace(head, replaced=ReplacedForward(type(outputs), zero))


def verify_causal_loss(head: CausalHead) -> str | None:
    """Compares the fused forward with the stock one on random hidden states, as the model stands.

    Loss (mean, and with num_items_in_batch where the forward takes it), gradients of the hidden
    states and of every trained parameter of the head, logits, and the by-products of a replaced
    forward must agree.

    Returns:
        None where they do, else the reason why the loss is not fused.
    """
    fused = FusedCausalLoss(head)
    parameters = [p for p in head.head.parameters() if p.requires_grad]
    takes_count = "num_items_in_batch" in fused.__signature__.parameters or any(
        p.kind is p.VAR_KEYWORD for p in fused.__signature__.parameters.values()
    )
    try:
        with _trial(head) as run:
            hidden, labels = run.hidden, run.labels()
            count = torch.tensor(23, device=hidden.device)
            for more in ({}, {"num_items_in_batch": count}) if takes_count else ({},):
                outputs = [run(forward, labels, **more) for forward in (fused.stock, fused.run)]
                if not fused.calls:
                    reads = ", ".join(fused.stock_calls) or "no cross_entropy was called"
                    return f"the loss is not the cross-entropy of the logits ({reads})"
                reason = _differ(outputs, [hidden, *parameters], hidden.dtype)
                if reason is not None:
                    return f"verification: {reason}"
    except Unsupported as unsupported:
        return unsupported.reason
    except Exception as error:  # as in `recognise_causal_head`
        return f"its loss could not be tried ({type(error).__name__}: {error})"
    return None


def verify_log_probs(head: CausalHead) -> str:
    """Why the log-probabilities that TRL's fused head asks for stay its own; "" if they need not.

    Values, the number of hits and the gradient of the hidden states, of a loss that weighs each
    token anew, are compared on random hidden states.
    """
    fused = FusedCausalLoss(head)
    if forward_with(fused.stock, fused._log_probs_fall_back) is None:
        return ""  # nobody asks
    try:
        with _trial(head) as run:
            labels, limit = run.labels(), _limit(run.hidden.dtype)
            # more than the forward's log-probabilities: one word less, or none
            up = torch.randn(labels.shape, generator=run.generator, device=labels.device)

            def numbers(forward: Callable[..., Any]) -> dict[str, Tensor]:
                output = run(forward, labels, **{ARGUMENT: True})
                found = {name: output[name] for name in _TRLS if output.get(name) is not None}
                weighed = (output.log_probs * up[:, : output.log_probs.shape[1]]).sum()
                (found[_INPUT],) = torch.autograd.grad(weighed, run.hidden)
                if output.get("is_top1") is not None:
                    found["hits"] = output.is_top1.sum()
                return found

            reason = _first_difference(numbers(fused.stock), numbers(fused.log_probs), limit)
    except Exception as error:  # as in `recognise_causal_head`
        return f"its log-probabilities could not be tried ({type(error).__name__}: {error})"
    if not fused.calls:
        return next(iter(fused.stock_calls), "the trainer's fused head does not use its kernel")
    return "" if reason is None else f"verification: {reason}"


def _limit(dtype: torch.dtype) -> float:
    """Of a relative difference. 16 bit: stock's own rounding is allowed."""
    return {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2}.get(dtype, 3e-2)


def _differ(outputs: list[Any], leaves: list[Tensor], dtype: torch.dtype) -> str | None:
    """What of the fused outputs differs from the stock ones."""
    stock, fused = (
        {
            "loss": output.loss.detach(),
            **{name: output.get(name) for name in (*_BY_PRODUCTS, "aux_loss") if name in output},
            **_gradients(output.loss, leaves),
        }
        for output in outputs
    )
    # Read last: a reading counts as one.
    if outputs[0].get("logits") is not None:
        stock["logits"] = outputs[0].logits.detach()
        fused["logits"] = outputs[1].logits + 0.0
    if _INPUT not in stock:
        return "its forward does not call its backbone as a whole"
    return _first_difference(stock, fused, _limit(dtype))


def _first_difference(
    stock: dict[str, Tensor], fused: dict[str, Tensor], limit: float
) -> str | None:
    if set(stock) != set(fused):
        return f"{sorted(set(stock) ^ set(fused))[0]} is in only one of stock and fused outputs"
    for name, expected in stock.items():
        expected, got = expected.detach().double(), fused[name].detach().double()
        error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
        # A prediction may turn where rounding makes or breaks a tie of two logits.
        off = abs(float(got - expected)) > 1 if name in _COUNTS else error > limit
        if off or error != error:
            return f"{name} differs by {error:.1e} from stock (limit {limit:.0e})"
    return None


def _gradients(loss: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    names = [_INPUT, *(f"gradient of the head's parameter {i}" for i in range(len(leaves) - 1))]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
