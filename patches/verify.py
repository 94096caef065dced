"""Proves a fused block against the stock one: forward and gradients, on a copy of the very module.

The block is copied with the user's own dtype, quantisation and config. The copy gets random LoRA B
matrices, biases and norm weights (fresh ones would hide mistakes behind zeros and ones) and no
dropout (the masks are the generator's business). Then

1. in fp32, fused and stock must agree to `FP32_TOLERANCE`: this tells a tanh GELU from an exact
one. Stock must agree with itself when it is called again, and must not have changed;
2. they must agree in evaluation mode, with a padding mask, with documents packed into a row and at
the far end of the positions, and roughly (`EXTREME_TOLERANCE`) on zeros, on inputs near zero, on
large ones and with large norm weights, where a clamp or an epsilon shows;
3. in the block's own dtype, the fused error against that fp32 result is at most twice stock's own,
and stock's is no larger than rounding explains.

What shows only in longer or more rows than the probe's, in more calls than a proof makes, or in
input of a kind that none of these is, no proof can see.

The model itself is not touched: no parameter, gradient, buffer or random number of it changes.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.patches.bind import Binding, Unsupported
from lorafuse.patches.exact_fp32 import exact_fp32
from lorafuse.patches.signature import changed, set_layer_index, state
from lorafuse.patches.structure import is_linear

FP32_TOLERANCE = 2e-5
# In other circumstances than the first: what differs there differs by far more.
OTHER_TOLERANCE = 1e-4
# On inputs that no training has: a clamp shows as more than this. Attention is ill-conditioned
# there, so that three times what 2^-17 of the input changes is allowed, too.
EXTREME_TOLERANCE = 2e-2
# What moves a result by more than this has made it a matter of chance.
_TELLS_NOTHING = 0.05
# More than this, and than four times the fused form's error, is not what 16 bit round.
_ROUNDING = 0.03
# A gradient smaller than this part of all of a block's is compared with that part.
_GRADIENT_FLOOR = 1e-6
_SLACK = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: FP32_TOLERANCE}

# Puts the fused forwards on a copy of the block: (copy, binding) -> None.
BindFused = Callable[[nn.Module, Binding], None]
# Calls a block: (block, hidden states [B, S, K]) -> its output tensors.
CallBlock = Callable[[nn.Module, Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class _Trial:
    """One comparison in fp32: hidden states times `scale`, norm weights times `gain`."""

    what: str
    scale: float = 1.0
    gain: float = 1.0
    training: bool = True

    @property
    def extreme(self) -> bool:
        return self.scale != 1 or self.gain != 1


_TRIALS = (
    _Trial("in evaluation mode", training=False),
    _Trial("on zeros", scale=0.0),
    _Trial("on inputs near zero", scale=1e-3),
    _Trial("on large inputs", scale=100.0),
    _Trial("on very large inputs", scale=1e4),
    _Trial("with large norm weights", gain=10.0),
    _Trial("with very large norm weights", gain=100.0),
)


def verify(
    block: nn.Module,
    bind_fused: BindFused,
    call: CallBlock,
    hidden_size: int,
    hidden_dtype: torch.dtype,
    shape: Sequence[int] = (2, 12),
    other_calls: Mapping[str, CallBlock] | None = None,
) -> str | None:
    """Compares the fused form of a copy of `block` with the stock form.

    Args:
        block: the stock module; only read.
        bind_fused: puts the fused forwards on a copy.
        call: runs a block on hidden states of [*shape, hidden_size].
        hidden_size: K of the hidden states.
        hidden_dtype: of the hidden states in the user's run. Where it is fp32 and the weights
            compute in 16 bit, the second comparison runs under autocast, as the trainer will.
        shape: batch and sequence.
        other_calls: further ways to call the block, by what is tried with them.

    Returns:
        None where the fused form is right, else the reason why it is not used.
    """
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return "its weights are not here yet (meta device)"
    if any(hasattr(p, "placements") for p in block.parameters()):
        return "its weights are sharded (DTensor): fuse before the model is wrapped"
    with _undisturbed(device):
        torch.manual_seed(0)
        h = torch.randn(*shape, hidden_size, device=device)
        try:
            own = _prepared_copy(block)
            exact = _in_fp32(copy.deepcopy(own))
            oracle = _run(exact, call, h, None)
        except Exception as error:  # a stock module may raise anything on inputs that it never sees
            return f"it could not be tried alone ({type(error).__name__}: {error})"
        try:
            fused = _run(exact, call, h, bind_fused)
            reason = _compare(fused, oracle, dict.fromkeys(oracle, FP32_TOLERANCE), "in fp32")
            del fused
            reason = reason or _unsteady(exact, call, h, oracle)
            for trial in _TRIALS:
                reason = reason or _try(exact, call, h, bind_fused, trial)
            for what, other in (other_calls or {}).items():
                reason = reason or _try(exact, other, h, bind_fused, _Trial(what))
            del exact
            dtype = _compute_dtype(own)
            packed = any(_parametrized_4bit(m) for m in own.modules())  # plain in `exact`
            if reason is not None or (dtype == torch.float32 and not packed):
                return reason
            low, mixed = h.to(hidden_dtype), None
            if hidden_dtype == torch.float32 and dtype != torch.float32:
                mixed = dtype
            stock = _run(_unpacked(own) if packed else own, call, low, None, mixed)
            fused = _run(own, call, low, bind_fused, mixed)
            stock_error = _errors(stock, oracle)
            limits = {name: 2 * error + _SLACK[dtype] for name, error in stock_error.items()}
            what = f"in {str(dtype).removeprefix('torch.')}"
            reason = _compare(fused, oracle, limits, what)
            return reason or _other_in_16_bit(stock, fused, oracle, what)
        except Unsupported as unsupported:
            return unsupported.reason
        except Exception as error:  # the block is not what it looks like: other arguments, say
            return f"its fused form fails ({type(error).__name__}: {error})"


def _other_in_16_bit(
    stock: dict[str, Tensor], fused: dict[str, Tensor], oracle: dict[str, Tensor], what: str
) -> str | None:
    """Why a stock block is further from its own fp32 results than rounding takes it.

    Then it computes something else in 16 bit, and to be no worse than that proves nothing.
    """
    names = [n for n in oracle if n.startswith("output") or n == "gradient of input"]
    theirs, ours = ({n: found[n] for n in names if n in found} for found in (stock, fused))
    exact = {n: oracle[n] for n in names}
    ours_error = _errors(ours, exact)
    for name, error in _errors(theirs, exact).items():
        if not error <= _ROUNDING + 4 * ours_error[name]:
            return (
                f"verification {what}: {name} of stock differs by {error:.1e} from stock in fp32, "
                f"and the fused one's by {ours_error[name]:.1e}: it computes something else there"
            )
    return None


def depends_on_index(
    block: nn.Module,
    call: CallBlock,
    hidden_size: int,
    indexes: Sequence[int],
    shape: Sequence[int] = (2, 12),
) -> bool:
    """Whether a copy of the stock block computes something else in another place of the model.

    Args:
        block: only read.
        call: as of `verify`.
        hidden_size: K of the hidden states.
        indexes: the places of the blocks that are like this one.
        shape: batch and sequence.
    """
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    if device.type == "meta" or any(hasattr(p, "placements") for p in block.parameters()):
        return False  # is not fused at all
    with _undisturbed(device):
        torch.manual_seed(0)
        h = torch.randn(*shape, hidden_size, device=device)
        try:
            exact = _in_fp32(_prepared_copy(block))
            first = _run(exact, call, h, None)
            limits = dict.fromkeys(first, OTHER_TOLERANCE)
            for index in indexes:
                set_layer_index(exact, index)
                if _compare(_run(exact, call, h, None), first, limits, "") is not None:
                    return True
        except Exception:  # a stock module may raise anything; then each is proven on its own
            return True
    return False


def _unsteady(
    exact: nn.Module, call: CallBlock, h: Tensor, oracle: dict[str, Tensor]
) -> str | None:
    """Why a stock block cannot be stood in for: a second call gives something else, or changes it.

    Marks that the first call leaves, as bitsandbytes' layers do, are no state.
    """
    before = state(exact)
    again = _run(exact, call, h, None)
    after = state(exact)
    if before != after:
        return f"verification: each call of the stock form changes {changed(before, after)}"
    limits = dict.fromkeys(oracle, OTHER_TOLERANCE)
    if (reason := _compare(again, oracle, limits, "in fp32")) is not None:
        return f"{reason}, which differs as much from call to call"
    return None


def _try(
    exact: nn.Module, call: CallBlock, h: Tensor, bind_fused: BindFused, trial: _Trial
) -> str | None:
    """One comparison in fp32; None where it agrees or cannot be made."""
    norms = [
        p
        for m in exact.modules()
        if not is_linear(m)
        for p in m.parameters(recurse=False)
        if p.dim() == 1
    ]
    if trial.gain != 1 and not norms:
        return None
    h = h * trial.scale
    exact.train(trial.training)
    with torch.no_grad():
        kept = [p.clone() for p in norms]
        for p in norms:
            p.mul_(trial.gain)
    try:
        try:
            oracle = _run(exact, call, h, None)
        except Exception:  # a stock module may raise anything on inputs that it never sees
            return None
        if not all(bool(value.isfinite().all()) for value in oracle.values()):
            return None
        try:
            fused = _run(exact, call, h, bind_fused)
        except Unsupported:  # goes the stock way, which is right
            return None
        limits, floor = dict.fromkeys(oracle, OTHER_TOLERANCE), 0.0
        if trial.extreme:
            floor = _GRADIENT_FLOOR
            noise = 1 + 2.0**-17 * torch.randn_like(h)
            moved = _errors(_run(exact, call, h * noise, None), oracle, floor)
            limits = {
                name: EXTREME_TOLERANCE + 3 * error if error < _TELLS_NOTHING else float("inf")
                for name, error in moved.items()
            }
        return _compare(fused, oracle, limits, f"in fp32 {trial.what}", floor)
    finally:
        exact.train()
        with torch.no_grad():
            for p, value in zip(norms, kept, strict=True):
                p.copy_(value)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random state, TF32 and autocast as before afterwards; gradients on, autocast off inside."""
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(cuda),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        exact_fp32(),
    ):
        yield


def _prepared_copy(block: nn.Module) -> nn.Module:
    """A copy with nothing trivial in it: no zeros in B and biases, no ones in norms, no dropout."""
    replica = copy.deepcopy(block)
    replica.train()
    with torch.no_grad():
        for name, module in replica.named_modules():
            module.__dict__.pop("forward", None)
            # From transformers 5.24 on it is `forward` that checkpoints.
            if "gradient_checkpointing" in module.__dict__:
                module.gradient_checkpointing = False
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            ):
                hooks.clear()
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
            for key, parameter in module.named_parameters(recurse=False):
                parameter.grad = None
                if "lora_B" in name and key == "weight":
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
                elif key.endswith("bias") or (parameter.dim() == 1 and not is_linear(module)):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return replica


def _is_4bit(parameter: Tensor) -> bool:
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(parameter, bnb.nn.Params4bit)


def _parametrized_4bit(module: nn.Module) -> bool:
    lists: Any = getattr(module, "parametrizations", {})
    return any(hasattr(one[0], "quant_state") for one in lists.values())


def _unpacked(block: nn.Module) -> nn.Module:
    """A copy with plain weights in place of parametrized ones, in the dtype that they compute in.

    A copy's parametrized weights are not the model's: torch keeps what it caches of them under the
    original's name, and so misses what Axolotl repairs of PEFT there.
    """
    replica = copy.deepcopy(block)
    _make_all_plain(replica)
    return replica


def _make_all_plain(replica: nn.Module) -> None:
    for module in list(replica.modules()):
        if _parametrized_4bit(module):
            _make_plain(module)


def _make_plain(module: Any) -> None:
    """Puts dequantised parameters in place of packed ones. The class, which torch made for this
    module, is shared with the original: it stays as it is, and the copy gets the one below it."""
    weights = {name: getattr(module, name).detach() for name in module.parametrizations}
    module.__class__ = type(module).__mro__[1]
    del module._modules["parametrizations"]
    for name, weight in weights.items():
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def _in_fp32(replica: nn.Module) -> nn.Module:
    """The copy with every float in fp32; 4-bit weights stay packed and dequantise to fp32.

    But those that are parametrized become plain: PEFT's stock forward has mistakes on them
    (`moe.ignored_adapters`), and the proof is against what it means.
    """
    _make_all_plain(replica)
    for module in replica.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
            config._attn_implementation = "sdpa"  # type: ignore[union-attr] # flash has no fp32
        for parameter in module.parameters(recurse=False):
            if _is_4bit(parameter):
                parameter.quant_state.dtype = torch.float32  # type: ignore[attr-defined]
                module.compute_dtype = torch.float32  # type: ignore[assignment]
                module.compute_type_is_set = True  # type: ignore[assignment]
            elif parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[key] = buffer.float()
    return replica


def _compute_dtype(block: nn.Module) -> torch.dtype:
    """The 16-bit dtype that the block's frozen weights compute in, else fp32."""
    for module in block.modules():
        state = getattr(module, "quant_state", None)  # of a parametrization
        if state is not None and state.dtype in (torch.bfloat16, torch.float16):
            return torch.bfloat16 if state.dtype == torch.bfloat16 else torch.float16
        for parameter in module.parameters(recurse=False):
            own = getattr(module, "compute_dtype", None) if _is_4bit(parameter) else parameter.dtype
            if own in (torch.bfloat16, torch.float16) and not parameter.requires_grad:
                return own
    return torch.float32


def _run(
    block: nn.Module,
    call: CallBlock,
    h: Tensor,
    bind_fused: BindFused | None,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients of one call, by name: "output 0", "input", and each parameter's own."""
    binding = Binding()
    try:
        if bind_fused is not None:
            bind_fused(block, binding)
        h = h.detach().requires_grad_()
        with torch.autocast(h.device.type, autocast, enabled=autocast is not None):
            outputs = call(block, h)
        binding.check_called()  # a call that went the stock way would prove nothing
        trained = {n: p for n, p in block.named_parameters() if p.requires_grad}
        generator = torch.Generator(h.device).manual_seed(1)
        loss = sum(
            (o.float() * torch.randn(o.shape, device=o.device, generator=generator)).sum()
            for o in outputs
        )
        leaves = [h, *trained.values()]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    finally:
        binding.undo()
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, gradient in zip(["input", *trained], gradients, strict=True):
        if gradient is not None:
            results[f"gradient of {name}"] = gradient
    return results


def _errors(
    got: dict[str, Tensor], oracle: dict[str, Tensor], floor: float = 0.0
) -> dict[str, float]:
    """Relative error of each result, ‖got − oracle‖ / ‖oracle‖; one transfer for all.

    Args:
        got: the results.
        oracle: what they should be.
        floor: a gradient counts as no smaller than this part of all gradients together.
    """
    norms = {name: exact.double().norm() for name, exact in oracle.items()}
    whole = sum(n.square() for name, n in norms.items() if name.startswith("gradient"))
    least = floor * torch.as_tensor(whole).sqrt() + 1e-30
    errors = [
        (got[name].double() - exact.double()).norm()
        / norms[name].clamp_min(least if name.startswith("gradient") else 1e-30)
        if name in got and got[name].shape == exact.shape
        else torch.full((), float("inf"), device=exact.device, dtype=torch.float64)
        for name, exact in oracle.items()
    ]
    return dict(zip(oracle, torch.stack(errors).tolist(), strict=True))


def _compare(
    got: dict[str, Tensor],
    oracle: dict[str, Tensor],
    limits: dict[str, float],
    what: str,
    floor: float = 0.0,
) -> str | None:
    if set(got) != set(oracle):
        odd = sorted(set(got) ^ set(oracle))
        return f"verification: stock and fused differ in which results there are: {odd[0]}"
    worst = ("", 0.0, 0.0)
    for name, error in _errors(got, oracle, floor).items():
        if not error <= limits[name] and (not worst[0] or not error <= worst[1]):
            worst = (name, error, limits[name])
    if not worst[0]:
        return None
    name, error, limit = worst
    return f"verification {what}: {name} differs by {error:.1e} from stock (limit {limit:.1e})"
