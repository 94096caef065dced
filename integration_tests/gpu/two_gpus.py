"""Data parallel on two GPUs: under each wrapper the same steps, stock and fused, from one state.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 integration_tests/gpu/two_gpus.py --json two.json
    torchrun --nproc-per-node 2 integration_tests/gpu/two_gpus.py --device cpu

Each rank trains on rows of its own. Loss (mean over the ranks) and gradient norm of each step, the
whole gradient of the first step and what the adapters have moved by at the end are compared with
stock's. A fused run may be twice as far from stock as the farther of two others is: stock once
more, and stock in fp32 on the very weights. The adapters must be the same on both ranks, and the
report of each rank must say what is expected under that wrapper. Else the exit status is 1.

The mode "off | offload" is another one on each rank: nobody may wait for what the other does not
do. `--spoil` makes the fused gradients wrong on one rank, which must be found.
"""

import argparse
import json
import math
import os
import warnings
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from data_parallel import TOKENS, Case, Run, Trainer, gathered, leave, mode_of
from torch import Tensor

MODES = ("off", "selective", "offload", "auto", "off | offload")
IN_LAYERS = ("lora_mlp", "lora_qkv", "lora_o", "rope")
WHOLE = (*IN_LAYERS, "rms_norm", "cross_entropy", "checkpointing")
# Of a relative difference. A loss of stock may lie at its fp32 value by chance.
LEAST = {"loss": 2e-4, "gradient norm": 1e-3, "first gradient": 1e-3, "adapters": 1e-3}
APART = "FSDP takes each of them on its own"
SHARDED = "its weights are sharded by now"
CASES = {
    "DDP, NF4": Case("ddp", "nf4", fuse_first=False),
    "DDP, bf16, accumulating": Case("ddp", micro_batches=2),
    "DDP, bf16, looks for unused parameters": Case("ddp that looks", fuse_first=False),
    "DDP, bf16, one rank falls back": Case("ddp", hooked_rank=1),
    "FSDP2, NF4": Case("fsdp2", "nf4"),
    "FSDP2, bf16": Case("fsdp2"),
    "FSDP2, bf16 adapters, accumulating": Case("fsdp2, mixed", micro_batches=2),
    "FSDP2, bf16, one rank falls back": Case("fsdp2", hooked_rank=1),
    "FSDP2, fused too late": Case("fsdp2", fuse_first=False, stock=SHARDED),
    "FSDP2, each LoRA matrix apart": Case("fsdp2, apart", stock=APART),
    "FSDP1": Case("fsdp1", stock=APART, only_on="cuda"),
    "FSDP1, fused too late": Case("fsdp1", fuse_first=False, stock=SHARDED, only_on="cuda"),
}


def distances(run: Run, other: Run) -> dict[str, float]:
    """Relative differences: the largest of the steps' numbers, that of the vectors' lengths."""

    def largest(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    def of_vectors(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    return {
        "loss": largest(run.losses, other.losses),
        "gradient norm": largest(run.norms, other.norms),
        "first gradient": of_vectors(run.first_gradient, other.first_gradient),
        "adapters": of_vectors(run.moved, other.moved),
    }


def departures(found: dict[str, float], scatter: list[dict[str, float]]) -> list[str]:
    """What of a fused run is too far from stock.

    Args:
        found: its distances from stock.
        scatter: those of other stock runs.
    """
    problems = []
    for name, distance in found.items():
        limit = 2 * max(one[name] for one in scatter) + LEAST[name]
        if not distance <= limit or not math.isfinite(distance):
            problems.append(f"{name} departs by {distance:.1e} (limit {limit:.1e})")
    return problems


def misses(case: Case, mode: str, reports: list[Any], on_gpu: bool) -> list[str]:
    """What the ranks' reports do not say as it should be."""
    problems = []
    for rank, rows in enumerate(reports):
        for name in WHOLE:
            row = rows.get(name, {})  # no layer is fused: `auto` has nothing to say of it
            if not is_as_expected(case, rank, name, row):
                problems.append(f"rank {rank}: {name} is {row}")
        levels = rows.get("checkpointing", {}).get("levels", ())
        chosen = {level.split(",")[0] for level in levels}  # ", gate/up on the host"
        if not case.stock and mode != "auto" and chosen != {mode_of(mode, rank)}:
            problems.append(f"rank {rank}: fused_checkpointing is {chosen}, not {mode}")
        if on_gpu and case.wrapper.startswith("ddp") and not rows["optimizer"]["called"]:
            problems.append(f"rank {rank}: the optimiser was not fused: {rows['optimizer']}")
    return problems


def is_as_expected(case: Case, rank: int, name: str, row: dict[str, Any]) -> bool:
    """Whether a row of a report says what that wrapper lets it be."""
    why = [one["reason"] for one in row.get("fallbacks", []) + row.get("runtime_fallbacks", [])]
    found, fused, called = (row.get(key, 0) for key in ("found", "fused", "called"))
    if case.stock == SHARDED:
        return called == 0 and (name == "checkpointing" or any(SHARDED in one for one in why))
    if name in IN_LAYERS and case.stock:
        return called == 0 and any(case.stock in one for one in why)
    if name in IN_LAYERS and rank == case.hooked_rank:
        return bool(called == fused - 1) and any("a hook on" in one for one in why)
    if name != "cross_entropy" and (case.stock or rank == case.hooked_rank):
        return True  # norms lie within the layers and behind them
    return found == fused == called > 0 and not why


def examine(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """All runs of one case, and what is wrong with them."""
    case, say = CASES[name], print if dist.get_rank() == 0 else lambda *_, **__: None
    trainer = Trainer(args, case)
    oracle, stock, again = trainer.run(exact=True), trainer.run(), trainer.run()
    scatter = [distances(again, stock), distances(oracle, stock)]
    say(f"\n{name}\n  again  {shown(scatter[0])}\n  fp32   {shown(scatter[1])}", flush=True)
    result: dict[str, Any] = {
        "case": asdict(case), "stock": told(stock), "again": told(again), "fp32": told(oracle),
        "scatter": scatter, "modes": {}, "problems": [],
    }  # fmt: skip
    if not stock.ranks_equal:
        result["problems"].append("stock: the adapters differ between the ranks")
    for mode in args.modes:
        run = trainer.run(mode)
        found = distances(run, stock)
        problems = departures(found, scatter)
        problems += misses(case, mode, run.reports, args.device == "cuda")
        if not torch.equal(run.start, stock.start):
            problems.append("it did not begin where stock did")
        if not run.ranks_equal:
            problems.append("the adapters differ between the ranks")
        # Where the ranks differ, one alone may see it.
        problems = list(dict.fromkeys(one for rank in gathered(problems) for one in rank))
        say(f"  {mode}: {shown(found)}; GB of each rank: {run.peak_GB}, stock {stock.peak_GB}")
        for step in range(args.steps):
            losses = f"loss {run.losses[step]:.5f}, stock {stock.losses[step]:.5f}"
            norms = f"norm {run.norms[step]:.5f}, stock {stock.norms[step]:.5f}"
            say(f"    step {step}: {losses}; {norms}")
        say(*(f"    WRONG: {one}" for one in problems), sep="\n", flush=True)
        result["modes"][mode] = told(run) | {"distances": found}
        result["problems"] += [f"{mode}: {one}" for one in problems]
    return result


def told(run: Run) -> dict[str, Any]:
    """A run for the file: without its vectors."""
    names = ("losses", "norms", "ranks_equal", "peak_GB", "reports")
    return {name: getattr(run, name) for name in names}


def shown(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in numbers.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, help="of each of a micro-batch's two rows")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES, metavar="MODE")
    parser.add_argument("--spoil", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.tokens = args.tokens or TOKENS[args.device]
    warnings.filterwarnings("ignore", category=UserWarning)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Whoever waits in vain fails, and says where.
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    usable = [name for name in args.cases if CASES[name].only_on in ("", args.device)]
    results: dict[str, Any] = {}
    problems: list[str] = []
    for name in usable:
        results[name] = examine(args, name)
        problems += [f"{name}: {one}" for one in results[name]["problems"]]
        if args.json and dist.get_rank() == 0:  # by now, in case that the next one ends badly
            with open(args.json, "w", encoding="utf-8") as file:
                what = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
                found = {"gpu": what, "torch": torch.__version__, "args": vars(args)}
                json.dump(found | {"cases": results, "problems": problems}, file, indent=1)
    leave(problems)


if __name__ == "__main__":
    main()
