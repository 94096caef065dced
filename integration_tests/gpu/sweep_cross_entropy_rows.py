"""Which tile, warps, stages and cache hints the loss rows' kernel should have on this GPU.

    python integration_tests/gpu/sweep_cross_entropy_rows.py              # 2,048 x 128,256 in bf16
    git show main:kernels/cross_entropy_rows.py > before.py               # and an older kernel
    python integration_tests/gpu/sweep_cross_entropy_rows.py --against before.py

A chunk of 2,048 rows is what an 8B model's head makes at a time; a step of 8,192 tokens takes four.
The floor reads the logits once and writes them once, at 3 TB/s. Each setting is first compared with
the torch form on a few rows. Compiling is shared out over processes: some 20 s in all on 16 cores.
"""

import argparse
import itertools
import sys
from types import ModuleType
from typing import Any

import torch
import triton
from sweeps import compile_in_processes, load
from torch import Tensor

from lorafuse.kernels import cross_entropy_rows as current

# (words a tile, words a thread at a time), stages; the kernel has tile / 32 / words warps
TILES = (
    (4096, 16),
    (4096, 32),
    (8192, 8),
    (8192, 16),
    (8192, 32),
    (16384, 16),
    (16384, 32),
    (32768, 32),
)
SETTINGS = [(*tile, stages) for tile, stages in itertools.product(TILES, (1, 2, 3, 4))]
Setting = tuple[int, int, int]


def use(setting: Setting) -> None:
    current._BLOCK_V, current._WORDS, current._STAGES = setting


def run(module: ModuleType, z: Tensor, labels: Tensor, rows: Any = None) -> list[Tensor]:
    loss, entropy = (torch.empty(z.shape[0], device=z.device) for _ in range(2))
    prediction = torch.empty_like(labels)
    (rows or module._triton_rows_)(
        z, labels, module.CrossEntropyOptions(), loss, entropy, prediction, True
    )
    return [loss, entropy, prediction, z]


def make(rows: int, words: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(rows, -(-words // 64) * 64, device="cuda", dtype=torch.bfloat16)[:, :words]
    return z, torch.randint(words, (rows,), device="cuda")


def error(words: int) -> float:
    """Largest error of the present setting on a few rows, as a share of the largest number."""
    z, labels = make(16, words)
    expected = run(current, z.clone(), labels, current._torch_rows_)
    ours = run(current, z, labels)
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-9))
        for a, b in zip(ours, expected, strict=True)
    )


def time_ms(module: ModuleType, z: Tensor, labels: Tensor) -> float:
    def step() -> None:
        run(module, z, labels)

    return float(triton.testing.do_bench(step, warmup=3, rep=12, return_mode="median"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--words", type=int, default=128256)
    parser.add_argument("--against", help="an older cross_entropy_rows.py")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:  # one of the processes that only compile
        index, of = options.share
        z, labels = make(2, options.words)
        for setting in SETTINGS[index::of]:
            use(setting)
            try:
                run(current, z, labels)
            except Exception:  # too much shared memory: told by the process that measures
                pass
        return
    here = [sys.executable, __file__, "--words", str(options.words)]
    compile_in_processes(here)
    z, labels = make(options.rows, options.words)
    floor = 2 * z.numel() * z.itemsize / 3e9
    print(
        f"{torch.cuda.get_device_name()}: [{options.rows}, {options.words}], floor {floor:.3f} ms"
    )
    if options.against:
        print(f"{time_ms(load(options.against), z, labels):.3f} ms  {options.against}")
    results = []
    default = current._BLOCK_V, current._WORDS, current._STAGES
    for setting in SETTINGS:
        use(setting)
        try:
            results.append((time_ms(current, z, labels), setting, error(options.words)))
        except Exception as problem:
            print(setting, type(problem).__name__, str(problem)[:100])
    results.sort()
    for place, (ms, (block, words, stages), worst) in enumerate(results):
        chosen = " <- present default" if default == (block, words, stages) else ""
        if place < 16 or chosen or worst > 1e-2:
            print(
                f"{ms:.3f} ms  tile {block:5d}, {block // words // 32:2d} warps, {stages} stages, "
                f"error {worst:.1e}{chosen}"
            )


if __name__ == "__main__":
    main()
