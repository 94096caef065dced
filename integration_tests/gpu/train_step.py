"""One whole training step, stock against fused, on a model of a real geometry with random weights.

Both run in this process on the same model, adapters and tokens: first loss and gradient norm of the
same step (they must agree), then time and peak memory, with 8-bit AdamW and gradient checkpointing
or without.

    python integration_tests/gpu/train_step.py --geometry llama-3.1-8b --tokens 4096 --batch 2
    python integration_tests/gpu/train_step.py --geometry tiny --quant none --device cpu --steps 1
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

GEOMETRIES: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
    ),
    "mistral-7b": lambda: MistralConfig(sliding_window=None),
    "qwen3-8b": lambda: Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "gemma-2-9b": lambda: Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
}


def build(config: PretrainedConfig, device: torch.device, quant: str, attention: str) -> nn.Module:
    """The causal LM in bf16 with random weights, its layers' linears in NF4 where asked for."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name and quant == "nf4":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantised(module, device))
        elif "Rotary" in type(module).__name__:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config).to(device))
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                shape, kind = parameter.shape, {"device": device, "dtype": torch.bfloat16}
                data = torch.ones(shape, **kind) if len(shape) == 1 else torch.randn(shape, **kind)
                module.register_parameter(
                    key, nn.Parameter(data if len(shape) == 1 else data.mul_(0.02), False)
                )
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # Gemma's embedding scale
                module.register_buffer(key, torch.tensor(config.hidden_size**0.5).to(device))
    if tied:
        model.tie_weights()
    return model


def quantised(linear: nn.Linear, device: torch.device) -> nn.Module:
    """A bitsandbytes Linear4bit of the same shape: NF4, block 64, double quantised."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    shape = linear.out_features, linear.in_features
    data = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight._quantize(device)
    return layer


class Step:
    """Forward, backward, optimiser step, as a trainer with bf16 autocast does them."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, vocabulary: int) -> None:
        self.model, self.args, self.vocabulary = model, args, vocabulary
        self.device = torch.device(args.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.device.type == "cuda":
            import bitsandbytes as bnb

            self.optimizer: Any = bnb.optim.AdamW8bit(trained, lr=1e-5)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.trained = trained

    def tokens(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = self.args.batch, self.args.tokens
        return torch.randint(0, self.vocabulary, shape, generator=generator).to(self.device)

    def backward(self, seed: int) -> tuple[Tensor, Tensor]:
        """(loss, gradient norm); gradients are left on the parameters."""
        ids = self.tokens(seed)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, float("inf"))
        return loss.detach(), norm

    def run(self, seed: int) -> None:
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self) -> dict[str, float]:
        def synchronize() -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        start = time.perf_counter()
        self.run(100)
        synchronize()
        first = time.perf_counter() - start
        self.run(101)
        synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for i in range(self.args.steps):
            start = time.perf_counter()
            self.run(102 + i)
            synchronize()
            times.append(time.perf_counter() - start)
        count = self.args.batch * self.args.tokens
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
        median = statistics.median(times)
        return {
            "first_step_s": first,
            "step_ms": median * 1e3,
            "spread_ms": (max(times) - min(times)) * 1e3,
            "tokens_per_s": count / median,
            "peak_GB": peak,
        }


def profile(step: Step, rows: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        step.run(200)
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) * 1e3
    events = [e for e in trace.key_averages() if e.device_type.name == "CUDA"]
    total = sum(e.self_device_time_total for e in events) / 1e3
    print(f"profile: GPU busy {total:.1f} ms of {wall:.1f} ms (profiled)")
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:rows]:
        print(f"{event.self_device_time_total / 1e3:8.2f} ms {event.count:5d} {event.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quant", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stock", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--fp8", action="store_true", help="fused_fp8: base GEMMs in FP8")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device(args.device)
    config = GEOMETRIES[args.geometry]()
    if args.layers:
        config.num_hidden_layers = args.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: args.layers]
    model = build(config, device, args.quant, args.attention)
    lora = LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, lora)
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    peft.train()
    if args.checkpointing:
        peft.gradient_checkpointing_enable({"use_reentrant": False})
        peft.enable_input_require_grads()
    step = Step(peft, args, config.vocab_size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {args}")
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "args": vars(args)}

    stock_numbers = None
    if args.stock:
        stock_numbers = [float(x) for x in step.backward(1)]
        step.optimizer.zero_grad(set_to_none=True)

    from lorafuse import fuse

    start = time.perf_counter()
    report = fuse(peft, optimizer=step.optimizer, fused_fp8=args.fp8)
    result["fuse_s"] = time.perf_counter() - start
    fused_numbers = [float(x) for x in step.backward(1)]
    step.optimizer.zero_grad(set_to_none=True)
    print(f"fuse() took {result['fuse_s']:.2f} s")
    print(f"same step: stock {stock_numbers} fused {fused_numbers} (loss, gradient norm)")
    result["parity"] = {"stock": stock_numbers, "fused": fused_numbers}
    result["fused"] = step.measure()
    if args.profile:
        profile(step, args.profile)
    result["report"] = report.to_dict()
    for operation, one in result["report"]["operations"].items():
        print(f"  {operation}: found {one['found']} fused {one['fused']} called {one['called']}")
    for note in report.notes:
        print(f"  note: {note}")
    report.unfuse()
    if args.stock:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result["stock"] = step.measure()
    for system in ("stock", "fused"):
        if system in result:
            print(system, {k: round(v, 2) for k, v in result[system].items()})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1, default=str)


if __name__ == "__main__":
    main()
