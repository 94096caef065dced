"""Which tile, warps, stages and programs the GLU's backward with adapters should have on this GPU.

    python integration_tests/gpu/sweep_glu_adapters.py                # [8192, 14336], ranks of 32
    git show main:kernels/glu_adapters.py > before.py                 # and an older kernel
    python integration_tests/gpu/sweep_glu_adapters.py --against before.py

The floor reads gate, up and dm and writes two of them, at 3 TB/s. A setting's time is that of the
whole call, sums of the shares included. Each is first compared with the torch form on some rows.
Compiling is shared out over processes: some 25 s in all on 16 cores.
"""

import argparse
import itertools
import sys
from types import ModuleType

import torch
import triton
from sweeps import compile_in_processes, load
from torch import Tensor

from lorafuse.kernels import glu_adapters as current

# tokens a tile, columns a tile, warps
TILES = (
    (32, 64, 4),
    (64, 64, 8),
    (64, 64, 4),
    (32, 128, 8),
    (32, 128, 4),
    (16, 128, 4),
    (32, 32, 2),
    (64, 128, 8),
)
COMPILED = [(*tile, stages) for tile, stages in itertools.product(TILES, (2, 3, 4))]
PROGRAMS = (448, 672, 896, 1120, 1792)
Setting = tuple[int, int, int, int]
Inputs = tuple[Tensor, Tensor, list[Tensor]]


def use(setting: Setting, programs: int = 1024) -> None:
    current._BLOCK_T, current._BLOCK_I, current._WARPS, current._STAGES = setting
    current._PROGRAMS = programs


def make(tokens: int, width: int, rank: int) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    return draw(tokens, 2 * width + 64), draw(tokens, width), [draw(tokens, rank) for _ in range(3)]


def run(module: ModuleType, inputs: Inputs, reference: bool = False) -> list[Tensor]:
    gu, dm, factors = inputs
    width = dm.shape[1]
    function = module.reference if reference else module.glu_bwd_adapters_
    out = function(gu[:, :width], gu[:, width : 2 * width], dm, "silu", *factors)
    return [gu[:, : 2 * width], out.dA_down, out.dB_gate, out.dB_up]


def error(width: int, rank: int) -> float:
    """Largest error of the present setting, as a share of the largest number."""
    gu, dm, factors = make(1008, width, rank)  # 16 divides it, as it divides what is timed
    expected = run(current, (gu.clone(), dm.clone(), factors), reference=True)
    ours = run(current, (gu, dm, factors))
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(ours, expected, strict=True)
    )


def time_ms(module: ModuleType, inputs: Inputs) -> float:
    def step() -> None:
        run(module, inputs)

    return float(triton.testing.do_bench(step, warmup=2, rep=10, return_mode="median"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--against", help="an older glu_adapters.py")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    width, rank = options.width, options.rank
    if options.share:  # one of the processes that only compile
        index, of = options.share
        # As many tokens and programs as are timed: Triton specialises on the number of tiles.
        inputs = make(options.tokens, width, rank)
        for setting in COMPILED[index::of]:
            try:
                for programs in PROGRAMS:
                    use(setting, programs)
                    run(current, inputs)
            except Exception:  # too many registers or too much shared memory: told when measured
                pass
        return
    here = [sys.executable, __file__, "--width", str(width), "--rank", str(rank)]
    here += ["--tokens", str(options.tokens)]
    compile_in_processes(here)
    inputs = make(options.tokens, width, rank)
    floor = 5 * inputs[1].numel() * inputs[1].itemsize / 3e9
    print(f"{torch.cuda.get_device_name()}: [{options.tokens}, {width}], floor {floor:.3f} ms")
    if options.against:
        print(f"{time_ms(load(options.against), inputs):.3f} ms  {options.against}")
    results = []
    for setting in COMPILED:
        try:
            use(setting)
            worst = error(width, rank)
            for programs in PROGRAMS:
                use(setting, programs)
                results.append((time_ms(current, inputs), setting, programs, worst))
        except Exception as problem:
            print(setting, type(problem).__name__, str(problem)[:100])
    results.sort()
    for place, (ms, (tokens, columns, warps, stages), programs, worst) in enumerate(results):
        if place < 20 or worst > 1e-2:
            print(
                f"{ms:.3f} ms  tile {tokens} x {columns}, {warps} warps, {stages} stages, "
                f"{programs} programs  error {worst:.1e}"
            )


if __name__ == "__main__":
    main()
