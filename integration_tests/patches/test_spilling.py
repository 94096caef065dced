"""How many layers' gate/up goes to the host: what the link carries, evenly among them."""

from itertools import pairwise

import pytest
import torch

from lorafuse.patches.layer_sizes import LayerSizes
from lorafuse.patches.spilling import Rates, evenly, measured_rates, shares, spilled_layers

LLAMA_8B = [LayerSizes(4096, 6144, 4096, 28672, gradients=10 * 2**20)] * 32
RATES = Rates(flops=750e12, to_host=55e9)  # of an H100 on PCIe 5
TOKENS = 8192


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


def test_fewer_go_where_memory_is_short() -> None:
    asked: list[int] = []

    def fits(chosen: list[bool]) -> bool:
        asked.append(sum(chosen))
        return sum(chosen) <= 5

    assert sum(spilled_layers([0.5] * 20, fits)) == 5 and asked == [10, 7, 5]
    assert spilled_layers([0.5] * 20, lambda chosen: False) == [False] * 20
    assert spilled_layers([0.0] * 20, fits) == [False] * 20


@pytest.mark.gpu
def test_rates_of_this_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    state = torch.cuda.get_rng_state()
    rates = measured_rates(0)
    assert 1e12 < rates.flops < 1e16 and 1e9 < rates.to_host < 1e12
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert measured_rates(0) is rates
