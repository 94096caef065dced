"""Mixtures of experts on a GPU: right first, then each way to the products, then whole steps.

    python integration_tests/gpu/moe_step_times.py --stages check variants
    python integration_tests/gpu/moe_step_times.py --stages steps --layers 8
    python integration_tests/gpu/moe_step_times.py --stages steps --only mixtral-8x7b/nf4
    python integration_tests/gpu/moe_step_times.py --stages steps --only gpt-oss --batch 8 \
        --tokens 1024 --layers 4  # its attention is eager: rows of 4096 take 20 GB a layer
    python integration_tests/gpu/moe_step_times.py --tiny --device cpu  # does it run?

check: the kernels against fp32, both ways to the large products, and a small model's step fused
against stock. variants: the grouped products of Mixtral-8x7B, Qwen3-30B-A3B and gpt-oss-20b, by
`torch.nn.functional.grouped_mm` (plain, with LoRA folded into K, with LoRA added) and by our kernel
in several tilings; and what stands around them. steps: tokens/s and peak memory of whole training
steps, stock (the best of transformers' ways, gradient checkpointing) and fused (with it, and
without), NF4 and bf16, LoRA on the experts or not, with as many layers as fit: a guess from the
free memory, halved until they do. On a CPU the numbers mean nothing.

Stock on 4-bit experts is repaired first, as Axolotl does: PEFT 0.20 leaves the inner of two
adapters out of its forward there, so it would be timed faster than it is and lorafuse would leave
it alone (`patches/moe.py: ignored_adapters`).

Writes $OUT/moe_step_times.json, after each result anew. What would begin after `--budget` seconds
is skipped, and said. Exit code 1 where a check failed.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from lorafuse import FuseConfig, fuse
from lorafuse.kernels import grouped_linear as grouped
from lorafuse.kernels.clamped_swiglu import (
    ClampedSwiglu,
    clamped_swiglu_bwd_,
    clamped_swiglu_fwd,
)
from lorafuse.kernels.expert_glu import expert_glu_bwd_
from lorafuse.kernels.expert_order import combine, gather, sort_by_expert
from lorafuse.kernels.glu import glu_fwd
from lorafuse.kernels.moe import ExpertProjection, moe, reference
from lorafuse.kernels.nf4 import dequantise_experts
from lorafuse.patches.structure import recognise_experts
from lorafuse.patches.weights import from_state
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import B_STD, _drawn, _nf4
from lorafuse.plugin.bench_worker import Training, is_out_of_memory, make_optimizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STOCK_WAYS = ("grouped_mm", "eager")  # batched_mm gathers a weight matrix for every slot
# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
TILINGS = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 256, 64, 8, 3))


def mixtral(**changes: int) -> MixtralConfig:
    """mistralai/Mixtral-8x7B-v0.1."""
    sizes = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    }  # fmt: skip
    return MixtralConfig(**(sizes | changes), rms_norm_eps=1e-5, sliding_window=None)


def qwen3(**changes: int) -> Qwen3MoeConfig:
    """Qwen/Qwen3-30B-A3B."""
    sizes = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
    }  # fmt: skip
    return Qwen3MoeConfig(**(sizes | changes), norm_topk_prob=True)


def gpt_oss(**changes: int) -> GptOssConfig:
    """openai/gpt-oss-20b."""
    sizes = {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
    }  # fmt: skip
    config = GptOssConfig(**(sizes | changes))
    config._attn_implementation = "eager"  # sdpa knows no sinks
    return config


TINY = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TINY_QWEN3 = TINY | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                     "head_dim": 16, "intermediate_size": 128}  # fmt: skip
TINY_MIXTRAL = TINY | {"num_local_experts": 4, "intermediate_size": 128}
TINY_GPT_OSS = TINY_MIXTRAL | {"num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
GEOMETRIES: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, int]]] = {
    "mixtral-8x7b": (mixtral, TINY_MIXTRAL),
    "qwen3-30b-a3b": (qwen3, TINY_QWEN3),
    "gpt-oss-20b": (gpt_oss, TINY_GPT_OSS),
}
# gpt-oss's, whose weights are stored transposed, too
CLAMPED = ClampedSwiglu(1.702, 7.0, 1.0, interleaved=True)


def geometry(name: str, tiny: bool) -> PretrainedConfig:
    make, changes = GEOMETRIES[name]
    return make(**changes if tiny else {})


class Results:
    """What was found, on the screen and in a file."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path, self.failed = path, False
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        self.content: dict[str, Any] = {
            "gpu": gpu, "torch": torch.__version__, "args": vars(args),
            "check": {}, "variants": {}, "steps": {},
        }  # fmt: skip

    def add(self, stage: str, name: str, what: Any) -> None:
        self.content[stage][name] = what
        self.path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        print(f"{stage:9} {name}: {what}", flush=True)

    def check(self, name: str, error: float, limit: float) -> None:
        right = error <= limit
        self.failed |= not right
        found = {"error": error, "limit": limit, "right": right}
        self.add("check", name, found)


def repair_stock() -> None:
    """PEFT's nested wrappers read a 4-bit weight before its adapter is registered, and cache it."""
    original = ParamWrapper._activate_lora

    @contextmanager
    def activate(self: Any, active: Any) -> Iterator[None]:
        with original(self, active):
            parametrize._cache.pop((id(self.get_base_layer()), self.parameter_name), None)
            yield

    ParamWrapper._activate_lora = activate


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


# check


def check_kernels(
    results: Results, device: torch.device, tiny: bool, clamped: ClampedSwiglu | None
) -> None:
    """moe() in bf16, both ways, against the definition in fp32: at most twice torch's own error.

    Args:
        results: where the errors go.
        device: of the tensors.
        tiny: small sizes.
        clamped: experts like gpt-oss's, transposed and biased, with this activation.
    """
    T, E, k, H, inner, r = (40, 4, 2, 64, 32, 4) if tiny else (3000, 16, 4, 1024, 512, 16)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) * scale
        return drawn.to(device, torch.bfloat16)

    index = torch.rand(T, E - 1, generator=generator).topk(k, dim=1).indices.to(device)
    tensors = [draw(T, H), draw(T, k).sigmoid()]
    weights = [draw(E, 2 * inner, H, scale=H**-0.5), draw(E, H, inner, scale=inner**-0.5)]
    biases = [draw(E, n) if clamped else None for n in (2 * inner, H)]
    if clamped:
        weights = [w.transpose(1, 2).contiguous() for w in weights]
    for n, w in ((2 * inner, H), (H, inner)):
        tensors += [draw(E, r, w, scale=w**-0.5), draw(E, n, r, scale=0.3)]

    def run(function: Any, given: list[Tensor], base: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in given]
        x, w, *adapters = leaves
        projections = [
            ExpertProjection(
                one, E, *adapters[2 * i : 2 * i + 2], 0.5, clamped is not None,
                None if bias is None else bias.to(x.dtype),
            )
            for i, (one, bias) in enumerate(zip(base, biases, strict=True))
        ]  # fmt: skip
        y = function(x, index, w, *projections, clamped or "silu")
        y.backward(torch.ones_like(y))
        return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]

    exact = run(reference, [t.float() for t in tensors], [w.float() for w in weights])
    stock = run(reference, tensors, weights)
    names = ("y", "dx", "dw", "dA gate/up", "dB gate/up", "dA down", "dB down")
    like = "like gpt-oss, " if clamped else ""
    for base in ("grouped_mm", "triton"):
        with way(base):
            ours = run(moe, tensors, weights)
        for name, a, b, c in zip(names, ours, stock, exact, strict=True):
            results.check(
                f"kernel, {like}{base}, {name}", relative(a, c), 2 * relative(b, c) + 4e-3
            )


@contextmanager
def way(base: str, tiling: tuple[int, ...] | None = None) -> Iterator[None]:
    """One of the two ways to the large products, and our kernel's tiling."""
    before = grouped.BASE, grouped.WIDE
    grouped.BASE, grouped.WIDE = base, tiling or grouped.WIDE  # type: ignore[assignment]
    try:
        yield
    finally:
        grouped.BASE, grouped.WIDE = before


def check_models(results: Results, args: argparse.Namespace) -> None:
    """A small model's step: fused against stock in fp32, and NF4 in bf16 by the loss."""
    for name in GEOMETRIES:
        for quant in ("none", "nf4"):
            case = Case(name, quant, True, 2)
            model = build(case, True, args, dtype=torch.float32)
            model.get_base_model().set_experts_implementation("eager")  # grouped_mm wants bf16
            training = training_of(model, args, case)
            stock = gradients(training)
            report = fuse(model, FuseConfig(fused_moe=True))
            ours = gradients(training)
            row = report.operations()["moe"]
            results.check(f"{name}, {quant}, experts not called", row.found - row.called, 0)
            shared = max(relative(ours[n], g) for n, g in stock.items())
            results.check(f"{name}, {quant}, fp32 gradients and loss", shared, 2e-4)
            report.unfuse()


def gradients(training: Training) -> dict[str, Tensor]:
    inputs = {name: tensor.to(training.device) for name, tensor in training.batch.items()}
    loss = training.model(**inputs, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in training.model.named_parameters() if p.grad is not None}
    training.model.zero_grad(set_to_none=True)
    return found | {"loss": loss.detach()}


# variants


def time_ms(function: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median of `repeats` calls, the caches between them as they are in a step: full of others."""
    function()
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def variants(results: Results, name: str, args: argparse.Namespace) -> None:
    config, device, r = geometry(name, args.tiny), torch.device(args.device), args.rank
    T, H = args.batch * args.tokens, config.hidden_size
    E = getattr(config, "num_local_experts", None) or config.num_experts
    k = config.num_experts_per_tok
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    index = torch.rand(T, E, device=device).topk(k, dim=1).indices
    rows, S = sort_by_expert(index, E), T * k

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    clamped = config.model_type == "gpt_oss"

    def weights_of(n: int, k: int) -> Tensor:
        """[E, n, k] as the family stores it."""
        return draw(E, k, n).transpose(1, 2) if clamped else draw(E, n, k)

    def add(what: str, function: Callable[[], Any], flop: float = 0, moved: float = 0) -> float:
        try:
            ms = time_ms(function, device)
        except Exception as error:  # a tiling may not fit; the others go on
            results.add("variants", f"{name}, {what}", f"{type(error).__name__}: {error}"[:160])
            return float("inf")
        found = {"ms": round(ms, 4)}
        if flop:
            found["TFLOP/s"] = round(flop / ms / 1e9, 1)
        if moved:
            found["GB/s"] = round(moved / ms / 1e6)
        results.add("variants", f"{name}, {what}", found)
        return ms

    for part, N, K in (("gate/up", 2 * inner, H), ("down", H, inner)):
        w, u = weights_of(N, K), draw(S, r)
        v_in, v_out = draw(E, K, r), draw(E, N, r)
        for direction, n, c, weight, v in (
            ("forward", N, K, w, v_out), ("dX", K, N, w.transpose(1, 2), v_in),
        ):  # fmt: skip
            title, flop = f"{part} {direction}", 2.0 * S * n * c
            by_token = part == "gate/up" and direction == "forward"
            x, each = draw(T if by_token else S, c), draw(S, c)
            best: dict[str, float] = {}
            if by_token:
                wide = torch.empty_like(each)
                add(f"{title}: gather", lambda x=x, o=wide: gather(x, rows, o), 0, 4 * S * c)

            def plain(each: Tensor = each, weight: Tensor = weight) -> Tensor:
                return grouped._grouped_mm(each, weight, rows)

            best["grouped_mm"] = add(f"{title}: grouped_mm", plain, flop)

            def added(
                each: Tensor = each, weight: Tensor = weight, u: Tensor = u, v: Tensor = v
            ) -> Tensor:
                return grouped.grouped_linear(each, weight, rows, u, v)

            with way("grouped_mm"):
                best["grouped_mm, LoRA added"] = add(
                    f"{title}: grouped_mm, LoRA added", added, flop
                )
            folded, wide_x = weights_of(n, c + 64), draw(S, c + 64)
            if direction == "dX":  # as `input_gradient` lays it out
                folded = weights_of(c + 64, n).transpose(1, 2)
            best["grouped_mm, LoRA folded"] = add(
                f"{title}: grouped_mm, LoRA folded",
                lambda a=wide_x, b=folded: grouped._grouped_mm(a, b, rows), flop,
            )  # fmt: skip
            del folded, wide_x
            for tiling in TILINGS:
                with way("triton", tiling):
                    what = f"triton {'x'.join(map(str, tiling))}, LoRA in it"
                    best[what] = add(
                        f"{title}: {what}",
                        lambda x=x, a=weight, u=u, v=v, b=by_token: grouped.grouped_linear(
                            x, a, rows, u, v, by_token=b
                        ),
                        flop,
                    )
            with_lora = {n: ms for n, ms in best.items() if n != "grouped_mm"}
            results.add("variants", f"{name}, {title}: fastest with LoRA",
                        min(with_lora, key=lambda n: with_lora[n]))  # fmt: skip
        dy, xr = draw(S, N), draw(S, K)
        A = draw(E, 64, K)
        add(f"{part}: XA", lambda x=xr, A=A: grouped.grouped_linear(x, A, rows), 0, 2 * S * K)
        G = draw(E, N, 64).transpose(1, 2)
        add(f"{part}: G", lambda d=dy, B=G: grouped.grouped_linear(d, B, rows), 0, 2 * S * N)
        add(f"{part}: dA", lambda x=xr, u=u: grouped.grouped_outer(u, x, rows), 0, 2 * S * K)
        add(f"{part}: dB", lambda d=dy, u=u: grouped.grouped_outer(u, d, rows), 0, 2 * S * N)
        stored = w.transpose(1, 2) if clamped else w
        packed = four_bit(stored, device)
        if packed is not None:
            columns = stored.shape[2]
            out = draw(E, stored.shape[1], columns + 64)[..., :columns]
            add(f"{part}: dequantise", lambda p=packed, o=out: dequantise_experts(p, o), 0,
                2.5 * E * N * K)  # fmt: skip
        del w, stored, dy, xr
    gu, m, dgu = draw(S, 2 * inner), draw(S, inner), draw(S, 2 * inner + 64)
    weights, y, out = torch.rand(T, k, device=device), draw(S, H), draw(T, H)
    halves = [t[:, s : s + inner] for t in (gu, dgu) for s in (0, inner)]
    add("sort", lambda: sort_by_expert(index, E))
    bias_gu, bias = (draw(E, n) if clamped else None for n in (2 * inner, H))

    def forward() -> None:
        if clamped:
            clamped_swiglu_fwd(gu, bias_gu, rows, CLAMPED, m)
        else:
            glu_fwd(*halves[:2], "silu", m)

    def backward() -> None:
        if clamped:
            clamped_swiglu_bwd_(gu, bias_gu, m, weights, rows, CLAMPED, dgu[:, : 2 * inner])
        else:
            expert_glu_bwd_(*halves[:2], m, weights, rows, "silu", *halves[2:])

    add("GLU forward", forward, 0, 6 * S * inner)
    add("GLU backward with dw", backward, 0, 12 * S * inner)
    add("combine", lambda: combine(y, rows, weights, out, bias), 0, 2 * S * H + 2 * T * H)


def four_bit(w: Tensor, device: torch.device) -> Any:
    """`w` [E, N, K] packed, or None without bitsandbytes."""
    try:
        import bitsandbytes.functional as bnb_functional
    except ImportError:
        return None
    packed, state = bnb_functional.quantize_4bit(
        w.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return from_state(packed, state)


# steps


@dataclass(frozen=True)
class Case:
    """One model to train."""

    name: str
    quant: str  # nf4 or none
    experts: bool  # LoRA on the experts, too
    layers: int

    def __str__(self) -> str:
        where = "LoRA on experts" if self.experts else "LoRA on attention"
        quant = "bf16" if self.quant == "none" else self.quant
        return f"{self.name}/{quant}, {where}, {self.layers} layers"


def build(
    case: Case, tiny: bool, args: argparse.Namespace, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Random weights, layer by layer on the device, each packed before the next is drawn."""
    device, config = torch.device(args.device), geometry(case.name, tiny)
    config.num_hidden_layers = case.layers
    config.output_router_logits = True
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = config.layer_types[: case.layers]
    attention = config._attn_implementation or "sdpa"
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    torch.manual_seed(0)
    head = base.get_output_embeddings()
    holders = [n for n, m in base.named_modules() if recognise_experts(m) is not None]
    for name, module in list(base.named_modules()):
        if case.quant == "nf4" and isinstance(module, nn.Linear) and module is not head:
            linear = _nf4(module, device)
            linear.compute_dtype = dtype
            linear.weight.quant_state.dtype = dtype
            if module.bias is not None:
                bias = _drawn("bias", module.bias, device).to(dtype)
                linear.bias = nn.Parameter(bias, False)
            base.set_submodule(name, linear)
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = nn.Parameter(_drawn(key, parameter, device).to(dtype), False)
                module.register_parameter(key, drawn)
                if case.quant == "nf4" and name in holders and drawn.dim() == 3:
                    from bitsandbytes.nn.parametrize import replace_parameter_4bit

                    replace_parameter_4bit(module, key, compress_statistics=True)
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    base.tie_weights()
    torch.manual_seed(1)
    parameters = [f"{h}.{key}" for h in holders for key in ("gate_up_proj", "down_proj")]
    lora = LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=ATTENTION, task_type="CAUSAL_LM",
        target_parameters=parameters if case.experts else None,
    )  # fmt: skip
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=B_STD)
    return model.train()


def training_of(model: Any, args: argparse.Namespace, case: Case) -> Training:
    job = Job(
        "lorafuse", case.name, case.layers, case.quant, args.rank, args.batch, args.tokens, 1,
        False, args.steps, "sdpa", args.device,
    )  # fmt: skip
    return Training(model, make_optimizer(model, torch.device(args.device)), job)


def checkpoint(model: Any, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()


def measure(training: Training, args: argparse.Namespace) -> dict[str, Any]:
    """Of whole steps that follow each other; loss and gradient norm of the untrained model."""
    loss, norm = (float(x) for x in training.backward())
    training.optimizer.zero_grad(set_to_none=True)
    first = training.timed_step()
    count = max(1, min(args.steps, int(args.seconds / max(first, 1e-3))))
    if training.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(training.timed_steps(count))
    peak = torch.cuda.max_memory_allocated() / 1e9 if training.on_gpu else 0.0
    training.check()
    tokens = args.batch * args.tokens
    return {
        "tokens_per_s": round(tokens / median), "step_ms": round(1e3 * median, 1),
        "peak_GB": round(peak, 2), "loss": loss, "gradient_norm": norm, "steps": count,
    }  # fmt: skip


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return function()
    except Exception as error:  # one system may fail in any way; the others go on
        if not is_out_of_memory(error):
            traceback.print_exc()
        what = "out of memory" if is_out_of_memory(error) else "failed"
        return {what: f"{type(error).__name__}: {error}"[:200]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def steps(results: Results, case: Case, args: argparse.Namespace) -> bool:
    """All systems on one model; False where something ran out of memory that has to fit."""
    model = build(case, args.tiny, args)
    training = training_of(model, args, case)
    start = [p.detach().clone() for p in training.trained]

    def again() -> dict[str, Any]:
        for parameter, value in zip(training.trained, start, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        return measure(training, args)

    found: dict[str, Any] = {}
    checkpoint(model, True)
    for stock_way in STOCK_WAYS:
        model.get_base_model().set_experts_implementation(stock_way)
        found[f"stock, {stock_way}"] = attempt(again)
    model.get_base_model().set_experts_implementation("grouped_mm")
    ran = [one for one in found.values() if "tokens_per_s" in one]
    for base in args.bases:
        with way(base):
            report = fuse(model, FuseConfig())
            found[f"fused, {base}, checkpointing"] = attempt(again)
            checkpoint(model, False)
            found[f"fused, {base}, all kept"] = attempt(again)
            checkpoint(model, True)
            row = report.operations()["moe"]
            found[f"fused, {base}, report"] = {
                "found": row.found, "fused": row.fused, "called": row.called,
                "why": [str(reason) for reason in (*row.fallbacks, *row.runtime_fallbacks)],
            }  # fmt: skip
            results.check(f"{case}, {base}: experts not called", row.found - row.called, 0)
            report.unfuse()
    fits = bool(ran) and "tokens_per_s" in found[f"fused, {args.bases[0]}, checkpointing"]
    if ran:
        best = max(ran, key=lambda one: one["tokens_per_s"])
        for system, one in found.items():
            if "tokens_per_s" in one:
                one["times_stock"] = round(one["tokens_per_s"] / best["tokens_per_s"], 2)
                one["loss_difference"] = one["loss"] - best["loss"]
                results.content["steps"].setdefault("table", []).append(
                    f"{case!s:58} {system:34} {one['tokens_per_s']:>8,} tokens/s "
                    f"{one['times_stock']:>5} x {one['peak_GB']:>6} GB"
                )
    results.add("steps", str(case), found)
    return fits


def layers_that_may_fit(name: str, quant: str, args: argparse.Namespace) -> int:
    """A first guess: weights in half of the free memory."""
    if args.layers:
        return int(args.layers)
    config = geometry(name, args.tiny)
    if args.device != "cuda":
        return int(config.num_hidden_layers)
    E = getattr(config, "num_local_experts", None) or config.num_experts
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    size = 3 * E * inner * config.hidden_size * (2.0 if quant == "none" else 0.53)
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(int(config.num_hidden_layers), int(0.5 * free / size)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="*", default=["check", "variants", "steps"])
    parser.add_argument("--only", default="", help="part of NAME/nf4 or NAME/none; all are checked")
    parser.add_argument("--bases", nargs="*", default=["grouped_mm"], help="or triton, for steps")
    parser.add_argument("--layers", type=int, help="without it, as many as fit")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="for the timed steps of one")
    parser.add_argument("--budget", type=float, default=520, help="seconds; later cases are left")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes; for a CPU")
    args = parser.parse_args()
    until = time.monotonic() + args.budget
    repair_stock()
    if args.tiny:
        args.tokens, args.rank, args.steps = 32, 4, 1
    folder = Path(os.environ.get("OUT", "."))
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "moe_step_times.json", args)
    if "check" in args.stages:
        for clamped in (None, CLAMPED):
            check_kernels(results, torch.device(args.device), args.tiny, clamped)
        small = argparse.Namespace(**(vars(args) | {"tokens": 32, "rank": 4, "steps": 1}))
        check_models(results, small)
    named = [name for name in GEOMETRIES if args.only.partition("/")[0] in name]
    for name in named if "variants" in args.stages else ():
        variants(results, name, args)
        gc.collect()
    cases = [
        Case(name, quant, experts, layers_that_may_fit(name, quant, args))
        for experts in (True, False)
        for quant in ("nf4", "none")
        for name in GEOMETRIES
        if args.only in f"{name}/{quant}"
    ]
    for case in cases if "steps" in args.stages else ():
        while True:
            if time.monotonic() > until:
                results.add("steps", str(case), f"skipped: {args.budget:g} s were over")
                break
            if steps(results, case, args) or case.layers == 1:
                break
            case = replace(case, layers=case.layers // 2)
            gc.collect()
    print("\n".join(results.content["steps"].get("table", [])))
    if results.failed:
        wrong = [name for name, one in results.content["check"].items() if not one["right"]]
        print(f"WRONG: {', '.join(wrong)}")
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
