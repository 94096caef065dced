"""Proves a fused block against the stock one: forward and gradients, on a copy of the very module.

The block is copied with the user's own dtype, quantisation and config. The copy gets random LoRA B
matrices, biases and norm weights (fresh ones would hide mistakes behind zeros and ones) and no
dropout (the masks are the generator's business). Then

1. in fp32, fused and stock must agree to `FP32_TOLERANCE`: this tells a tanh GELU from an exact
one;
2. in the block's own dtype, the fused error against that fp32 result is at most twice stock's own.

The model itself is not touched: no parameter, gradient, buffer or random number of it changes.
"""

import copy
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.patches.bind import Binding, Unsupported
from lorafuse.patches.structure import is_linear

FP32_TOLERANCE = 2e-5
_SLACK = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: FP32_TOLERANCE}

# Puts the fused forwards on a copy of the block: (copy, binding) -> None.
BindFused = Callable[[nn.Module, Binding], None]
# Calls a block: (block, hidden states [B, S, K]) -> its output tensors.
CallBlock = Callable[[nn.Module, Tensor], Sequence[Tensor]]


def signature(module: nn.Module) -> Hashable:
    """Equal for blocks that compute alike: classes, shapes, dtypes, and every plain attribute."""
    parts: list[Hashable] = []
    for name, child in module.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(child.__dict__.items())
            if isinstance(value, int | float | str | bool | None)
            and key not in ("layer_idx", "training", "gradient_checkpointing")
            and not key.startswith("_")
        )
        parameters = tuple(
            (key, tuple(p.shape), p.dtype, p.requires_grad)
            for key, p in child.named_parameters(recurse=False)
        )
        parts.append((name, type(child), plain, parameters))
    return tuple(parts)


def verify(
    block: nn.Module,
    bind_fused: BindFused,
    call: CallBlock,
    hidden_size: int,
    hidden_dtype: torch.dtype,
    shape: tuple[int, int] = (2, 12),
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
            reason = _compare(fused, oracle, dict.fromkeys(oracle, FP32_TOLERANCE), "fp32")
            del exact, fused
            dtype = _compute_dtype(own)
            packed = any(_parametrized_4bit(m) for m in own.modules())  # plain in `exact`
            if reason is not None or (dtype == torch.float32 and not packed):
                return reason
            low, mixed = h.to(hidden_dtype), None
            if hidden_dtype == torch.float32 and dtype != torch.float32:
                mixed = dtype
            stock_error = _errors(_run(own, call, low, None, mixed), oracle)
            limits = {name: 2 * error + _SLACK[dtype] for name, error in stock_error.items()}
            return _compare(_run(own, call, low, bind_fused, mixed), oracle, limits, str(dtype))
        except Unsupported as unsupported:
            return unsupported.reason
        except Exception as error:  # the block is not what it looks like: other arguments, say
            return f"its fused form fails ({type(error).__name__}: {error})"


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random state, TF32 and autocast as before afterwards; gradients on, autocast off inside."""
    cuda = [device] if device.type == "cuda" else []
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with (
        torch.random.fork_rng(cuda),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32


def _prepared_copy(block: nn.Module) -> nn.Module:
    """A copy with nothing trivial in it: no zeros in B and biases, no ones in norms, no dropout."""
    replica = copy.deepcopy(block)
    replica.train()
    with torch.no_grad():
        for name, module in replica.named_modules():
            module.__dict__.pop("forward", None)
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
                elif key == "bias" or (parameter.dim() == 1 and not is_linear(module)):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return replica


def _is_4bit(parameter: Tensor) -> bool:
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(parameter, bnb.nn.Params4bit)


def _parametrized_4bit(module: nn.Module) -> bool:
    lists: Any = getattr(module, "parametrizations", {})
    return any(hasattr(one[0], "quant_state") for one in lists.values())


def _make_plain(module: Any) -> None:
    """Puts dequantised parameters in place of packed ones. The class, which torch made for this
    module, is shared with the original: it stays as it is, and the copy gets the one below it."""
    weights = {name: getattr(module, name).float() for name in module.parametrizations}
    module.__class__ = type(module).__mro__[1]
    del module._modules["parametrizations"]
    for name, weight in weights.items():
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def _in_fp32(replica: nn.Module) -> nn.Module:
    """The copy with every float in fp32; 4-bit weights stay packed and dequantise to fp32.

    But those that are parametrized become plain: PEFT's stock forward has mistakes on them
    (`moe.ignored_adapters`), and the proof is against what it means.
    """
    for module in list(replica.modules()):
        if _parametrized_4bit(module):
            _make_plain(module)
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
        with torch.random.fork_rng([h.device] if h.is_cuda else []):
            torch.manual_seed(1)
            loss = sum((o.float() * torch.randn(o.shape, device=o.device)).sum() for o in outputs)
        leaves = [h, *trained.values()]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    finally:
        binding.undo()
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, gradient in zip(["input", *trained], gradients, strict=True):
        if gradient is not None:
            results[f"gradient of {name}"] = gradient
    return results


def _errors(got: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result, ‖got − oracle‖ / ‖oracle‖; one transfer for all."""
    errors = [
        (got[name].double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
        if name in got and got[name].shape == exact.shape
        else torch.full((), float("inf"), device=exact.device, dtype=torch.float64)
        for name, exact in oracle.items()
    ]
    return dict(zip(oracle, torch.stack(errors).tolist(), strict=True))


def _compare(
    got: dict[str, Tensor], oracle: dict[str, Tensor], limits: dict[str, float], what: str
) -> str | None:
    if set(got) != set(oracle):
        odd = sorted(set(got) ^ set(oracle))
        return f"verification: stock and fused differ in which results there are: {odd[0]}"
    worst = ("", 0.0, 0.0)
    for name, error in _errors(got, oracle).items():
        if not error <= limits[name] and (not worst[0] or not error <= worst[1]):
            worst = (name, error, limits[name])
    if not worst[0]:
        return None
    name, error, limit = worst
    return f"verification in {what}: {name} differs by {error:.1e} from stock (limit {limit:.1e})"
