"""The fused experts of a mixture of experts; router, auxiliary loss and shared experts stay stock.

transformers keeps the experts' weights in one module, [E, 2I, H] and [E, H, I], or transposed and
with biases (gpt-oss). PEFT adapts such a parameter by a wrapper around the module
(`target_parameters`), one in the other where both are adapted, and adds s B_e A_e for every expert
to the whole weight in each forward. 4-bit experts are parametrized by bitsandbytes
(`replace_parameter_4bit`; Axolotl's `quantize_moe_experts` uses it), and are dequantised whole.
The fused forward stands on what the model calls, the outermost wrapper.
"""

import copy
import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorafuse.kernels.moe import ExpertProjection, moe
from lorafuse.kernels.nf4 import Quantised4bit
from lorafuse.patches.bind import FusedForward, Unsupported
from lorafuse.patches.hooks import has_live_hooks
from lorafuse.patches.structure import Experts, bias_name, weight_shapes
from lorafuse.patches.weights import check_plain, from_state

# transformers' own ways to compute experts; another one was asked for by name.
_STOCK = (None, "eager", "batched_mm", "grouped_mm")
# bitsandbytes' and Axolotl's hooks around a parametrized module, which only cache what it reads.
_CACHING = ("_enable_parametrization_cache", "_disable_parametrization_cache")
EXPERTS = 3  # that a proof takes of a layer's: two that are used, and one that is not


class ExpertWeights:
    """One of the two weights with its adapters, read anew in every forward.

    Args:
        base: the module that holds it.
        name: its name there.
        wrapper: PEFT's wrapper of it, or None.
        transposed: it is [E, in, out].

    Raises:
        Unsupported: it is of a kind that cannot be fused.
    """

    def __init__(self, base: Any, name: str, wrapper: Any, transposed: bool) -> None:
        self.base, self.name, self.wrapper, self.transposed = base, name, wrapper, transposed
        self.experts, *sizes = weight_shapes(base)[name]
        self.out_features, self.in_features = sizes[::-1] if transposed else sizes
        self._state: Any = None
        self._known: Quantised4bit | None = None
        self.read()
        self.read_bias()

    def read(self) -> Tensor | Quantised4bit:
        """The frozen weight; raises Unsupported."""
        parametrized = getattr(self.base, "parametrizations", {})
        if self.name in parametrized:
            return self._quantised(parametrized[self.name])
        weight: nn.Parameter = self.base._parameters[self.name]
        if weight.requires_grad:
            raise Unsupported("its experts' weights are trained")
        check_plain(weight, "its experts' weight")
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise Unsupported(f"its experts' weights are {weight.dtype}")
        return weight

    def read_bias(self) -> Tensor | None:
        """The frozen bias [E, out] or None; raises Unsupported."""
        bias: nn.Parameter | None = self.base._parameters.get(bias_name(self.name))
        if bias is None:
            return None
        if bias.requires_grad:
            raise Unsupported("its experts' biases are trained")
        check_plain(bias, "its experts' bias")
        return bias.contiguous()

    def _quantised(self, parametrized: Any) -> Quantised4bit:
        state = getattr(parametrized[0], "quant_state", None)
        if len(parametrized) != 1 or state is None:
            kind = type(parametrized[-1]).__name__
            raise Unsupported(f"its experts' weights are parametrized ({kind})")
        data, known = parametrized.original.data, self._known
        if (
            known is None
            or state is not self._state
            or known.packed.data_ptr() != data.data_ptr()
            or known.absmax.data_ptr() != state.absmax.data_ptr()
        ):
            known = from_state(data, state)
            self._state, self._known = state, known
        return known

    def dtype(self, weight: Tensor | Quantised4bit) -> torch.dtype:
        """What stock computes in without autocast."""
        if isinstance(weight, Tensor):
            return weight.dtype
        own: torch.dtype = self._state.dtype
        return own

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": None, "_known": None}

    def projection(self, x: Tensor) -> ExpertProjection:
        """The weight as it is now, for an input like `x`.

        Raises:
            Unsupported: this call has to go the stock way.
        """
        weight = self.read()
        own = self.dtype(weight)
        if own != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise Unsupported(
                f"its experts compute in {own} but their input is {x.dtype}: use autocast"
            )
        plain = ExpertProjection(
            weight, self.experts, transposed=self.transposed, bias=self.read_bias()
        )
        active = self._active()
        if not active:
            return plain
        A, B, scales = [], [], []
        for name in active:
            down, up = self.wrapper.lora_A[name], self.wrapper.lora_B[name]
            if has_live_hooks(down) or has_live_hooks(up):
                raise Unsupported("a hook on its LoRA matrices has to run")
            if up.bias is not None:
                raise Unsupported("its LoRA has a bias")
            check_plain(down.weight, "its LoRA matrix")
            # as PEFT reads them: A's rows are an expert's ranks, B's columns a rank's experts
            a = down.weight.reshape(self.experts, -1, down.weight.shape[1])
            b = up.weight.reshape(up.weight.shape[0], -1, self.experts).permute(2, 0, 1)
            if self._turned():
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            A.append(a)
            B.append(b)
            scales.append(float(self.wrapper.scaling[name]))
        if len(active) == 1:
            return replace(plain, A=A[0], B=B[0], scale=scales[0])
        scaled = [b * s for b, s in zip(B, scales, strict=True)]
        return replace(plain, A=torch.cat(A, 1), B=torch.cat(scaled, 2))

    def _turned(self) -> bool:
        """Whether PEFT takes the weight's inputs for outputs, so that its A is a B, and its B an A.

        It takes a weight for [E, out, in] unless its module says `is_transposed`; before 0.19, for
        [E, in, out]. Where the two sizes are equal, only its own mark tells.
        """
        taken_for_out_in = bool(getattr(self.wrapper, "_did_swap_in_out_features", False))
        return taken_for_out_in == self.transposed

    def _active(self) -> list[str]:
        """Names of the adapters that this call applies."""
        wrapper = self.wrapper
        if wrapper is None:
            return []
        if wrapper.disable_adapters:
            if wrapper.merged:
                raise Unsupported("merged adapters are being disabled")
            return []
        if wrapper.merged:
            return []
        names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        for name in names:
            if name in wrapper.lora_variant:
                variant = type(wrapper.lora_variant[name]).__name__
                raise Unsupported(f"its adapter is a LoRA variant ({variant})")
        return names


class FusedExperts(FusedForward):
    """All experts of a layer: tokens sorted once, grouped products with LoRA in them.

    Raises:
        Unsupported: the experts are of a kind that cannot be fused.
    """

    operations = ("moe",)

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts.module)
        if experts.problem:
            raise Unsupported(experts.problem)
        self.base, self.activation = experts.base, experts.activation
        self.modules = _chain(experts.module)
        for part in self.modules:
            if "forward" in part.__dict__:
                raise Unsupported(f"the forward of its {type(part).__name__} was replaced already")
            if hasattr(part, "_hf_hook"):
                raise Unsupported("accelerate moves its weights in and out (device_map offload)")
        way = getattr(getattr(self.base, "config", None), "_experts_implementation", None)
        if way not in _STOCK:
            raise Unsupported(f"its experts are computed by {way}, as it was asked for")
        wrappers: dict[str, Any] = {}
        for part in self.modules[:-1]:
            if not isinstance(part, LoraLayer):
                raise Unsupported(f"its adapter is {type(part).__name__}, not LoRA")
            name = str(part.parameter_name)
            if name in wrappers:
                raise Unsupported(f"{name} has more than one wrapper")
            wrappers[name] = part
        if odd := set(wrappers) - {experts.gate_up, experts.down}:
            raise Unsupported(f"its adapter is on {', '.join(sorted(odd))}")
        self.gate_up, self.down = (
            ExpertWeights(self.base, name, wrappers.get(name), experts.transposed)
            for name in (experts.gate_up, experts.down)
        )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            x, index, weights = self._inputs(args, kwargs)
            if any(has_live_hooks(part, _CACHING) for part in self.modules[1:]):
                raise Unsupported(f"a hook on {type(self.base).__name__} has to run")
            projections = self.gate_up.projection(x), self.down.projection(x)
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, *args, **kwargs)
        self.calls += 1
        return moe(x, index, weights, *projections, self.activation)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Hidden states, the router's choice and its weights; raises Unsupported."""
        names = list(inspect.signature(type(self.base).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != 3 or set(given) != set(names):
            raise Unsupported("it was called with other arguments than its own three")
        x, index, weights = (given[name] for name in names)
        if not all(isinstance(t, Tensor) and t.dim() == 2 for t in (x, index, weights)):
            raise Unsupported("it was called with something else than three matrices")
        if index.shape != weights.shape or index.is_floating_point() or x.numel() == 0:
            raise Unsupported("the router's choice and its weights do not fit, or no token came")
        return [x, index, weights]


def _chain(module: nn.Module) -> list[nn.Module]:
    """PEFT's wrappers, outermost first, and the module in them."""
    chain = [module]
    while isinstance(chain[-1], BaseTunerLayer):
        chain.append(chain[-1].base_layer)  # type: ignore[arg-type]
    return chain


def small_copy(experts: Experts, count: int = EXPERTS) -> nn.Module:
    """A copy with the first `count` experts alone, computed by transformers' plain loop.

    A layer of Mixtral in fp32 would take 5.6 GB, and a proof needs several of them. The experts are
    alike, and what goes to which one shows with few. Nothing of the original is copied whole.
    """
    base: Any = experts.base
    shapes = weight_shapes(base)
    E = shapes[experts.down][0]
    memo: dict[int, Any] = {}
    parametrized = getattr(base, "parametrizations", {})
    fewer = count < E and all(
        count * math.prod(shapes[name][1:]) % _blocksize(parametrized[name]) == 0
        for name in (experts.gate_up, experts.down)
        if name in parametrized
    )
    if fewer:
        for name in (experts.gate_up, experts.down):
            if name in parametrized:
                _fewer_packed(parametrized[name], count, memo)
        for weight in base.parameters(recurse=False):  # and biases
            memo[id(weight)] = nn.Parameter(
                weight.data[:count].clone(), requires_grad=weight.requires_grad
            )
        for wrapper in _chain(experts.module)[:-1]:
            for A, B in zip(wrapper.lora_A.values(), wrapper.lora_B.values(), strict=True):  # type: ignore[operator]
                up = B.weight.data
                up = up.reshape(up.shape[0], -1, E)[..., :count].flatten(1)
                memo[id(A.weight)] = nn.Parameter(A.weight.data[: A.weight.shape[0] // E * count])
                memo[id(B.weight)] = nn.Parameter(up)
                for adapter in (A.weight, B.weight):
                    memo[id(adapter)].requires_grad_(adapter.requires_grad)
    copied = copy.deepcopy(experts.module, memo)
    for part in _chain(copied):
        if fewer and getattr(part, "num_experts", None) == E:
            part.num_experts = count  # type: ignore[assignment]
    config = getattr(_chain(copied)[-1], "config", None)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # type: ignore[union-attr]
    return copied


def _blocksize(parametrized: Any) -> int:
    state = getattr(parametrized[0], "quant_state", None)
    return 0 if state is None else int(state.blocksize)


def _fewer_packed(parametrized: Any, count: int, memo: dict[int, Any]) -> None:
    """Enters the first `count` experts of a packed weight, and its scales, into `memo`."""
    state = parametrized[0].quant_state
    elements = count * math.prod(state.shape[1:])
    packed = parametrized.original
    few = packed.data.view(torch.uint8).flatten()[: -(-elements // 2)].clone()
    memo[id(packed)] = nn.Parameter(few.view(packed.dtype).view(-1, 1), requires_grad=False)
    small = copy.copy(state)
    blocks = elements // state.blocksize
    small.absmax = state.absmax.flatten()[:blocks].clone()
    small.shape = torch.Size((count, *state.shape[1:]))
    if state.nested:
        small.state2 = copy.copy(state.state2)
        upper = -(-blocks // state.state2.blocksize)
        small.state2.absmax = state.state2.absmax.flatten()[:upper].clone()
    memo[id(state)] = small


def call_experts(module: nn.Module, h: Tensor) -> list[Tensor]:
    """Runs experts on [B, S, H], routed as a router would: by fixed choices, weighted by `h`.

    The last expert gets no token. The weights depend on `h`, so that their gradient is compared, in
    the input's.
    """
    base: Any = _chain(module)[-1]
    E, k = max(shape[0] for shape in weight_shapes(base).values()), 2
    x = h.flatten(0, 1)
    with torch.random.fork_rng([h.device] if h.is_cuda else []):
        torch.manual_seed(2)
        scores = torch.rand(x.shape[0], max(E - 1, 1))
        router = torch.randn(x.shape[1], min(k, scores.shape[1])) / x.shape[1] ** 0.5
    index = scores.topk(router.shape[1], dim=1).indices.to(h.device)
    weights = torch.sigmoid(x.float() @ router.to(h.device)).to(h.dtype)
    return [module.forward(x, index, weights)]


def _take_away_what_is_left(base: Any, counts: dict[str, int]) -> bool:
    """Whether a call has left parametrizations on `base` beside the first `counts` of each."""
    found = False
    for name, count in counts.items():
        while len(base.parametrizations[name]) > count:
            del base.parametrizations[name][-1]
            found = True
    return found


def ignored_adapters(experts: Experts) -> str | None:
    """What PEFT leaves out of stock's forward here, or None.

    On parametrized (4-bit) experts the outer of two wrappers makes torch cache the inner one's
    weight before its adapter is registered (PEFT 0.20; Axolotl repairs it). PEFT 0.21 leaves its
    own parametrizations behind and fails in the second forward: stock trains such experts not at
    all, lorafuse does, and takes away what the one call in here has left.
    """
    if len(_chain(experts.module)) < 3 or not hasattr(experts.base, "parametrizations"):
        return None
    # Asked of the module itself: torch caches a copy's weights under the original's name.
    lora = [p for n, p in experts.module.named_parameters() if "lora_" in n and p.requires_grad]
    hidden = weight_shapes(experts.base)[experts.gate_up][1 if experts.transposed else 2]
    state = experts.base.parametrizations[experts.gate_up][0].quant_state  # type: ignore[index,union-attr]
    device = lora[0].device if lora else torch.device("cpu")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        x = torch.ones(1, 4, hidden, device=device, dtype=state.dtype)
        counts = {name: len(one) for name, one in experts.base.parametrizations.items()}  # type: ignore[operator,union-attr]
        try:
            (y,) = call_experts(experts.module, x)
        finally:
            stock_fails = _take_away_what_is_left(experts.base, counts)
        gradients = torch.autograd.grad(y.float().sum(), lora, allow_unused=True) if lora else ()
    if stock_fails or all(gradient is not None for gradient in gradients):
        return None
    return (
        "PEFT leaves the inner of two adapters on 4-bit experts out of its forward, and trains it "
        "not at all (Axolotl repairs that); adapt one of the two weights alone, or keep experts "
        "in 16 bit"
    )
