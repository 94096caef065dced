"""How many layers' gate/up goes to the host: what the link carries, what memory has room for."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lorafuse.patches import checkpointing, recomputation
from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.checkpointing import OFF, OFFLOAD, SELECTIVE, Batch, LayerSizes, Spill
from lorafuse.patches.spilling import Rates, evenly, measured_rates, shares, spilled_layers

ALL = dict.fromkeys(OPERATIONS, True)
LLAMA_8B = [LayerSizes(4096, 6144, 4096, 28672, gradients=10 * 2**20)] * 32
RATES = Rates(flops=750e12, to_host=55e9)  # of an H100 on PCIe 5
TOKENS = 8192
BATCH = Batch(LLAMA_8B, TOKENS, 2, 4096)


def test_layers_are_spread_evenly_and_as_many_as_the_parts_add_up_to() -> None:
    for part in (0.0, 0.1, 0.34, 0.5, 0.66, 1.0):
        found = evenly([part] * 30)
        assert sum(found) == int(30 * part + 1e-9)
        gaps = [i for i, yes in enumerate(found) if yes]
        assert all(b - a <= 1 / part + 1 for a, b in pairwise(gaps))
    assert evenly([0.0, 0.9, 0.9, 0.0]) == [False, False, True, False]


def test_the_share_is_what_the_link_carries_while_the_layer_computes() -> None:
    size, flops = LLAMA_8B[0].gate_up_bytes(TOKENS, 2), LLAMA_8B[0].forward_flops(TOKENS, 4096)
    assert size == TOKENS * 2 * (28672 + 64)
    products = 4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096
    assert flops == pytest.approx(2 * TOKENS * (products + 4096 * 4096))
    (part,) = shares(LLAMA_8B[:1], [0], TOKENS, 4096, 2, RATES)
    assert part == pytest.approx(1.05 * flops / RATES.flops * RATES.to_host / size)
    (less,) = shares(LLAMA_8B[:1], [size // 4], TOKENS, 4096, 2, RATES)
    assert less == pytest.approx(part - 0.25)
    assert shares(LLAMA_8B[:1], [0], TOKENS, 4096, 2, Rates(750e12, 0.0)) == [0.0]
    assert shares(LLAMA_8B[:1], [0], TOKENS, 4096, 2, Rates(1e12, 1e12)) == [1.0]


def test_a_window_makes_less_work() -> None:
    full = LayerSizes(4096, 6144, 4096, 28672)
    sliding = LayerSizes(4096, 6144, 4096, 28672, window=512)
    assert sliding.forward_flops(16384, 16384) < full.forward_flops(16384, 16384)
    assert sliding.forward_flops(256, 256) == full.forward_flops(256, 256)


def test_fewer_go_where_memory_is_short() -> None:
    asked: list[int] = []

    def fits(chosen: list[bool]) -> bool:
        asked.append(sum(chosen))
        return sum(chosen) <= 5

    assert sum(spilled_layers([0.5] * 20, fits)) == 5 and asked == [10, 7, 5]
    assert spilled_layers([0.5] * 20, lambda chosen: False) == [False] * 20
    assert spilled_layers([0.0] * 20, fits) == [False] * 20


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
    taken = LLAMA_8B[0].taken(TOKENS, 4096, 2) * 31 if mode == OFFLOAD else 0
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
    taken = LLAMA_8B[0].taken(TOKENS, 4096, 2)
    assert BATCH.plan(0).modes == [OFFLOAD] * 32
    for layers in (0, 3, 20):
        limited = replace(BATCH, host_limit_bytes=(layers + 0.5) * taken)
        for spill in (None, Spill(RATES, limited.host_limit_bytes)):
            modes, spilled = limited.plan(0, spill=spill)
            assert modes == [OFFLOAD] * layers + [SELECTIVE] * (32 - layers)
            assert not any(spilled)


@pytest.mark.gpu
def test_rates_of_this_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    state = torch.cuda.get_rng_state()
    rates = measured_rates(0)
    assert 1e12 < rates.flops < 1e16 and 1e9 < rates.to_host < 1e12
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert measured_rates(0) is rates


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_on_a_gpu_gate_up_waits_where_there_is_room(mode, make_peft, step, monkeypatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setattr(recomputation, "SMALL_BYTES", 1)
    # A link that carries everything, beside a GPU that takes its time.
    monkeypatch.setattr(checkpointing, "measured_rates", lambda index: Rates(1.0, 1e9))
    model = make_peft("qwen3", torch.bfloat16)
    fused = apply(model, ALL, checkpointing=OFF)
    off = step(model)
    fused.unfuse()
    for limit, spills in ((None, True), (1e9, True), (1e3, False)):
        fused = apply(model, ALL, checkpointing=mode, host_limit_bytes=limit)
        for _ in range(2):
            ours = step(model)
            assert set(ours) == set(off)
            assert all(torch.equal(ours[name], off[name]) for name in off)
        assert [layer.spills for layer in fused.checkpointing.layers] == [spills, False]
        fused.unfuse()
