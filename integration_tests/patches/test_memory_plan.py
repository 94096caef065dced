"""Which mode each layer gets, and whose gate/up waits on the host: what memory has room for.

That a plan's bytes are those of a step is tested with the planner (`plugin/test_planner.py`).
"""

from dataclasses import replace

import pytest

from lorafuse.patches.layer_sizes import LayerSizes
from lorafuse.patches.memory_plan import Batch, Spill
from lorafuse.patches.modes import MODES, OFF, OFFLOAD, SELECTIVE
from lorafuse.patches.spilling import Rates

LLAMA_8B = [LayerSizes(4096, 6144, 4096, 28672, gradients=10 * 2**20)] * 32
RATES = Rates(flops=750e12, to_host=55e9)  # of an H100 on PCIe 5
TOKENS = 8192
BATCH = Batch(LLAMA_8B, TOKENS, 2, 4096)


@pytest.mark.parametrize("tokens", [128, 8192, 131072])
def test_a_plan_uses_what_is_free(tokens) -> None:
    order = {mode: i for i, mode in enumerate(MODES)}
    before = 0
    for free in (1e9, 4e9, 8e9, 16e9, 32e9, 64e9, 128e9, 1e12):
        modes = Batch(LLAMA_8B, tokens, 2).plan(free).modes
        ranks = [order[mode] for mode in modes]
        assert ranks == sorted(ranks, reverse=True)
        speed = sum(2 - rank for rank in ranks)
        assert speed >= before
        before = speed
    assert modes == [OFF] * 32
    assert Batch(LLAMA_8B, tokens, 2).plan(0).modes == [OFFLOAD] * 32
    assert Batch(LLAMA_8B, tokens, 2).plan(1e12, floor=SELECTIVE).modes == [SELECTIVE] * 32


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_a_plan_holds_to_both_memories_and_leaves_the_last_layer(mode) -> None:
    modes = [mode] * 32
    least = BATCH.bytes(modes)
    plenty = BATCH.spilled(modes, 1e12, Spill(RATES, 1e12))
    assert not plenty[-1] and (18 if mode == SELECTIVE else 9) <= sum(plenty) <= 24
    more = BATCH.bytes(modes, plenty)
    size = LLAMA_8B[0].gate_up_bytes(TOKENS, 2)
    assert least < more <= least + 2 * size
    # What the first layers spill passes through before the most is kept.
    assert BATCH.bytes(modes, BATCH.spilled(modes, least, Spill(RATES, 1e12))) <= least
    assert not any(BATCH.spilled(modes, 0, Spill(RATES, 1e12)))
    taken = LLAMA_8B[0].taken(TOKENS, 4096, 2, 2) * 31 if mode == OFFLOAD else 0
    few = BATCH.spilled(modes, 1e12, Spill(RATES, taken + 6 * size))
    assert 0 < sum(few) <= 6
    assert not any(BATCH.spilled(modes, 1e12, Spill(RATES, taken)))


def test_auto_computes_less_again_with_the_host_and_fits() -> None:
    spill = Spill(RATES, 64e9)
    for free in (4e9, 6e9, 8e9, 12e9, 16e9, 24e9, 30e9, 1e12):
        alone, both = BATCH.plan(free), BATCH.plan(free, spill=spill)
        assert both.kept_gate_up >= alone.kept_gate_up
        if BATCH.bytes(alone.modes) <= free:
            assert BATCH.bytes(*both) <= free
        if 8e9 <= free <= 16e9:
            assert both.kept_gate_up >= alone.kept_gate_up + 8
    assert both.modes == [OFF] * 32 and not any(both.spilled)
    assert not any(BATCH.plan(12e9, spill=Spill(RATES, 0.0)).spilled)


def test_auto_puts_no_more_on_the_host_than_it_may() -> None:
    taken = LLAMA_8B[0].taken(TOKENS, 4096, 2, 2)
    assert BATCH.plan(0).modes == [OFFLOAD] * 32
    for layers in (0, 3, 20):
        limited = replace(BATCH, host_limit_bytes=(layers + 0.5) * taken)
        for spill in (None, Spill(RATES, limited.host_limit_bytes)):
            modes, spilled = limited.plan(0, spill=spill)
            assert modes == [OFFLOAD] * layers + [SELECTIVE] * (32 - layers)
            assert not any(spilled)
