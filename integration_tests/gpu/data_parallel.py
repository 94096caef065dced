"""One model trained on each rank: DDP, FSDP2 or FSDP1 around it, stock or fused, from one state.

What `two_gpus.py` compares. Each rank trains on rows of its own; the mean loss, the norm of the
whole gradient and the adapters are those of all ranks together.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from lorafuse import FuseConfig, fuse
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.fuse import add_optimizer
from lorafuse.plugin.geometries import Model

# The table of embeddings is DDP's first bucket, alone: under `offload` it goes out from the host.
SIZES = {
    "cuda": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 131072,
        "max_position_embeddings": 8192,
    },
    "cpu": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
# Large tensors alone go to the host under `offload`: 2 x 1024 tokens of this width would stay.
TOKENS = {"cuda": 4096, "cpu": 16}


@dataclass(frozen=True)
class Case:
    """What the model is wrapped in, and what has to be fused then.

    Attributes:
        wrapper: a key of `WRAPPERS`.
        quant: of the base weights, "nf4" or "none" (bf16).
        micro_batches: of a step; all but the last are not synchronised.
        fuse_first: before the model is wrapped, as in Axolotl; else after, as by the callback.
        hooked_rank: has a hook on a module that the fused layer would bypass: falls back there.
        stock: the reason why nothing of a decoder layer is fused; "" where all of it is.
        only_on: the device type that the wrapper needs.
    """

    wrapper: str
    quant: str = "none"
    micro_batches: int = 1
    fuse_first: bool = True
    hooked_rank: int | None = None
    stock: str = ""
    only_on: str = ""


def ddp(model: nn.Module, looks: bool = False) -> nn.Module:
    """As the Trainer wraps; for PEFT models it lets DDP look for parameters without gradients."""
    on_gpu = next(model.parameters()).is_cuda
    ids = [torch.cuda.current_device()] if on_gpu else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=looks)


def fsdp2(model: Any, **options: Any) -> nn.Module:
    """As accelerate shards: each decoder layer, then the rest.

    4-bit weights lie in bf16 (`bnb_4bit_quant_storage`), as FSDP wants it of them.
    """
    for module in model.modules():
        if hasattr(module.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
            packed = module.weight.data.flatten().view(torch.bfloat16)
            module.weight.data = packed.view(-1, 1)
            module.weight.quant_storage = torch.bfloat16
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def fsdp2_apart(model: nn.Module) -> nn.Module:
    """As Axolotl shards: each trained matrix on its own, and then as accelerate."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            fully_shard(module.lora_A["default"])
            fully_shard(module.lora_B["default"])
    return fsdp2(model)


def fsdp1(model: nn.Module) -> nn.Module:
    """As PEFT has it: each decoder layer, and in it each trained matrix on its own."""
    from peft.utils.other import fsdp_auto_wrap_policy

    policy = fsdp_auto_wrap_policy(model)
    device = torch.cuda.current_device()
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=device
    )


def fsdp2_mixed(model: nn.Module) -> nn.Module:
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp2(model, mp_policy=mixed)


def leave(problems: list[str]) -> NoReturn:
    """The end of a rank, with an error where there are problems."""
    dist.barrier()
    dist.destroy_process_group()
    if problems:
        print("\n".join(problems), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: threads of gloo's that are left would abort a process that takes its time.
    os._exit(bool(problems))


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": ddp,
    "ddp that looks": lambda model: ddp(model, looks=True),
    "fsdp2": fsdp2,
    "fsdp2, mixed": fsdp2_mixed,
    "fsdp2, apart": fsdp2_apart,
    "fsdp1": fsdp1,
}


@dataclass
class Run:
    """One training run; vectors are the same on all ranks where the run is right."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    start: Tensor = field(default_factory=lambda: torch.empty(0))
    first_gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    moved: Tensor = field(default_factory=lambda: torch.empty(0))
    ranks_equal: bool = True
    # One of each rank.
    peak_GB: list[float] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)


class Trainer:
    """Trains the model of one case, again and again from the same state."""

    def __init__(self, args: argparse.Namespace, case: Case) -> None:
        self.args, self.case, self.rank = args, case, dist.get_rank()
        self.device = torch.device(args.device)
        self.config = LlamaConfig(**SIZES[args.device])
        self.job = Job(
            "lorafuse", "two_gpus", None, case.quant, 16, 2, args.tokens, 1, False, args.steps,
            "sdpa", args.device,
        )  # fmt: skip

    def build(self, exact: bool) -> Any:
        base: Any = base_model(Model("two_gpus", self.config, None), self.job)
        return adapted(in_fp32(base) if exact else base, self.job)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """8-bit AdamW where the case's runs can have it: not on a CPU, nor on FSDP's shards."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.device.type == "cuda" and self.case.wrapper.startswith("ddp"):
            import bitsandbytes as bnb

            eight_bit: torch.optim.Optimizer = bnb.optim.AdamW8bit(trained, lr=1e-3)
            return eight_bit
        return torch.optim.AdamW(trained, lr=1e-3)

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """[2, tokens] int64 of this rank."""
        seed = 1000 * step + 10 * micro + self.rank
        generator = torch.Generator().manual_seed(seed)
        shape = (self.job.batch, self.job.tokens)
        ids = torch.randint(0, self.config.vocab_size, shape, generator=generator)
        ids = ids.to(self.device)
        return {"input_ids": ids, "labels": ids}

    def run(self, mode: str | None = None, exact: bool = False) -> Run:
        """Stock without a mode; `exact`: in fp32, under DDP."""
        gc.collect()  # the run before: its peak is not ours
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        model, found, report = self.build(exact), Run(), None
        if mode is not None and self.case.fuse_first:
            report = fuse(model, self.flags(mode))
        wrapped = ddp(model) if exact else WRAPPERS[self.case.wrapper](model)
        if mode is not None and not self.case.fuse_first:
            report = fuse(wrapped, self.flags(mode))
        optimizer = self.optimizer(wrapped)
        if report is not None:
            add_optimizer(report, optimizer)
        if mode is not None and self.rank == self.case.hooked_rank:
            mlp = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
            mlp.register_forward_hook(lambda *_: None)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        with whole(wrapped):
            found.start = vector(trained)
        for step in range(self.args.steps):
            found.losses.append(self.backward(wrapped, step, exact))
            if mode is not None and self.args.spoil and self.rank == 1:
                for p in trained:
                    p.grad.mul_(1.5)
            norm: Any = clip(wrapped, trained)
            found.norms.append(float(full(norm)))
            if step == 0:
                with whole(wrapped):
                    found.first_gradient = vector([p.grad for p in trained])
            optimizer.step()
            optimizer.zero_grad()
        with whole(wrapped):
            found.moved = vector(trained) - found.start
        found.ranks_equal = is_equal_everywhere(found.moved)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
        found.peak_GB = gathered(peak)
        if report is not None:
            found.reports = gathered(report.to_dict()["operations"])
        return found

    def flags(self, mode: str) -> FuseConfig:
        return FuseConfig(fused_checkpointing=mode_of(mode, self.rank))

    def backward(self, model: nn.Module, step: int, exact: bool) -> float:
        """The mean loss over micro-batches and ranks."""
        count, total = self.case.micro_batches, torch.zeros((), device=self.device)
        for micro in range(count):
            with unsynchronised(model) if micro + 1 < count else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=not exact):
                    loss = model(**self.batch(step, micro), use_cache=False).loss / count
                loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()


def mode_of(mode: str, rank: int) -> str:
    """A rank's own, of one that differs between the ranks."""
    ways = mode.split(" | ")
    return ways[rank % len(ways)]


def in_fp32(base: nn.Module) -> nn.Module:
    """The same weights in fp32; 4-bit ones are dequantised."""
    for name, module in list(base.named_modules()):
        if hasattr(module.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            weight: Any = module.weight
            plain = nn.Linear(module.in_features, module.out_features, False, device="meta")
            data = dequantize_4bit(weight.data, weight.quant_state).float()
            plain.weight = nn.Parameter(data, requires_grad=False)
            base.set_submodule(name, plain)
    base.is_loaded_in_4bit = False
    return base.float()


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Gradients of what runs within stay on their rank."""
    if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def whole(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, FSDP1's parameters and gradients are not sharded."""
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model, with_grads=True)
    return nullcontext()


def clip(model: nn.Module, trained: list[nn.Parameter]) -> Any:
    """The norm of the whole gradient; clipped to where it is never clipped."""
    if isinstance(model, FullyShardedDataParallel):
        return model.clip_grad_norm_(1e9)
    return nn.utils.clip_grad_norm_(trained, 1e9)


def full(tensor: Any) -> Tensor:
    """All of a tensor that may lie in shards."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def vector(tensors: list[Any]) -> Tensor:
    """All of them as one [n], fp32."""
    return torch.cat([full(t).detach().float().flatten() for t in tensors])


def is_equal_everywhere(mine: Tensor) -> bool:
    first = mine.clone()
    dist.broadcast(first, 0)
    return all(gathered(torch.equal(first, mine)))


def gathered(value: Any) -> list[Any]:
    """One of each rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
