"""4-bit dequantisation against bitsandbytes' own, bit for bit, and against its definition."""

from collections.abc import Callable

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafuse.kernels import nf4, runtime
from lorafuse.kernels.nf4 import (
    Quantised4bit,
    dequantise,
    dequantise_experts,
    dequantise_rows,
    reference,
)

Randn = Callable[..., Tensor]


def wrap(packed: Tensor, state: bnb_functional.QuantState, N: int, K: int) -> Quantised4bit:
    """bitsandbytes' weight as ours, without a copy."""
    flat = packed.detach().view(torch.uint8).flatten()
    if not state.nested:
        return Quantised4bit(flat, state.code, state.absmax, state.blocksize, (N, K))
    return Quantised4bit(
        flat,
        state.code,
        state.absmax,
        state.blocksize,
        (N, K),
        code2=state.state2.code,
        absmax2=state.state2.absmax,
        offset=state.offset,
        blocksize2=state.state2.blocksize,
    )


def quantised(
    W: Tensor, quant_type: str = "nf4", nested: bool = True, blocksize: int = 64
) -> tuple[Quantised4bit, Callable[[torch.dtype], Tensor]]:
    """Our view of bitsandbytes' weight, and bitsandbytes' own dequantisation of it."""
    packed, state = bnb_functional.quantize_4bit(
        W.contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    w = wrap(packed, state, *W.shape)

    def by_bitsandbytes(dtype: torch.dtype) -> Tensor:
        state.dtype = dtype
        # As one row: on CPU, bitsandbytes 0.50.2 starts a new block at each row of W, which is
        # wrong where K is not a multiple of the block size.
        state.shape = torch.Size((1, W.numel()))
        values: Tensor = bnb_functional.dequantize_4bit(packed, state)
        return values.view(W.shape)

    return w, by_bitsandbytes


def spelt_out(w: Quantised4bit) -> Tensor:
    """The definition, element by element, in fp64."""
    N, K = w.shape
    packed, code, absmax = w.packed.tolist(), w.code.tolist(), w.absmax.tolist()
    if w.nested:
        code2, absmax2, offset = w.code2.tolist(), w.absmax2.tolist(), w.offset.item()
        absmax = [
            code2[index] * absmax2[block // w.blocksize2] + offset
            for block, index in enumerate(absmax)
        ]
    values = [
        code[packed[j // 2] >> 4 if j % 2 == 0 else packed[j // 2] & 15] * absmax[j // w.blocksize]
        for j in range(N * K)
    ]
    return torch.tensor(values, dtype=torch.float64).view(N, K)


def by_hand(
    N: int, K: int, blocksize: int, blocksize2: int | None, device: object
) -> Quantised4bit:
    """Random bytes and scales; shapes that bitsandbytes itself would not make."""
    elements = N * K
    blocks = -(-elements // blocksize)
    packed = torch.randint(0, 256, (-(-elements // 2),), dtype=torch.uint8)
    tensors = {"packed": packed, "code": torch.randn(16), "absmax": torch.rand(blocks)}
    if blocksize2 is not None:
        tensors |= {
            "absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            "code2": torch.randn(256),
            "absmax2": torch.rand(-(-blocks // blocksize2)),
            "offset": torch.tensor(0.25),
        }
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Quantised4bit(**on_device, blocksize=blocksize, shape=(N, K), blocksize2=blocksize2)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Equal, or in the interpreter, which truncates fp32 to bf16, at most the last bit apart."""
    if runtime.interpreting() and ours.dtype == torch.bfloat16:
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "single"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
def test_equals_bitsandbytes(randn: Randn, dtype, quant_type, nested, blocksize):
    N, K = 24, 2 * max(96, blocksize // 4)
    w, by_bitsandbytes = quantised(randn(N, K), quant_type, nested, blocksize)
    assert w.nested == nested
    out = torch.empty(N, K, dtype=dtype, device=w.packed.device)
    dequantise(w, out)
    assert_same_bits(out, by_bitsandbytes(dtype))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "single"])
@pytest.mark.parametrize(
    ("N", "K"), [(1, 2), (3, 10), (5, 122), (64, 64), (9, 576), (7, 96), (33, 160), (2, 4098)]
)
def test_sizes_into_a_wide_buffer(randn: Randn, dtype, N, K, nested):
    """Blocks that span rows, a cut last block, and columns beside W that must stay."""
    w, by_bitsandbytes = quantised(randn(N, K), nested=nested)
    wide = randn(N + 2, K + 5, dtype=dtype)
    before = wide.clone()
    dequantise(w, wide[1 : N + 1, 2 : K + 2])
    assert_same_bits(wide[1 : N + 1, 2 : K + 2], by_bitsandbytes(dtype))
    wide[1 : N + 1, 2 : K + 2] = before[1 : N + 1, 2 : K + 2]
    assert torch.equal(wide, before)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_weight_of_a_real_layer(device, randn: Randn, storage):
    """`Linear4bit` as transformers makes it: the packed bytes may be stored as another dtype."""
    layer = bnb.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage
    )
    W = randn(64, 128).cpu()
    layer.weight.data.copy_(W)
    layer = layer.to(device)
    assert layer.weight.dtype == storage and layer.weight.quant_state.nested
    out = torch.empty(64, 128, device=device)
    dequantise(wrap(layer.weight.data, layer.weight.quant_state, 64, 128), out)
    through_the_layer = layer(torch.eye(128, device=device)).detach().t()
    torch.testing.assert_close(out, through_the_layer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "single"])
def test_signal_to_noise(randn: Randn, nested):
    """Normal weights: 4 bits in blocks of 64 keep 20.7 dB of nf4's, 18 of fp4's."""
    W = randn(256, 320)
    for quant_type, least_db in (("nf4", 20.0), ("fp4", 17.0)):
        w, _ = quantised(W, quant_type, nested)
        noise = reference(w) - W
        ratio_db = 10 * (W.square().mean() / noise.square().mean()).log10().item()
        assert ratio_db > least_db, f"{quant_type}: {ratio_db:.2f} dB"


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    N=st.integers(1, 9),
    K=st.integers(1, 70),
    blocksize=st.sampled_from([2, 32, 64, 256]),
    blocksize2=st.sampled_from([None, 1, 4, 256]),
)
def test_any_shape(device, N, K, blocksize, blocksize2):
    """Odd sizes too: N * K odd leaves half a byte unused."""
    w = by_hand(N, K, blocksize, blocksize2, device)
    out = torch.empty(N, K, device=device)
    dequantise(w, out)
    torch.testing.assert_close(out.cpu().double(), spelt_out(w), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("blocksize2", [None, 256], ids=["single", "nested"])
@pytest.mark.parametrize(("N", "K"), [(64, 128), (5, 123)], ids=["whole tiles", "cut tile"])
def test_triton_equals_reference(device, dtype, N, K, blocksize2):
    w = by_hand(N, K, 64, blocksize2, device)
    out = torch.empty(N, K, dtype=dtype, device=device)
    dequantise(w, out)
    assert_same_bits(out, reference(w).to(dtype))


GROUPS = {  # N of each, K
    "one": ((5,), 96),
    "two": ((64, 128), 64),
    "two, cut": ((7, 3), 122),
    "three": ((64, 32, 32), 128),
    "three, cut": ((33, 1, 6), 123),
    "three of several tiles": ((70, 9, 40), 160),
}


@pytest.mark.parametrize("blocksize2", [None, 256], ids=["single", "nested"])
@pytest.mark.parametrize(("rows", "K"), GROUPS.values(), ids=list(GROUPS))
def test_several_weights_into_one_buffer(device, randn: Randn, dtype, rows, K, blocksize2):
    """The bits of a launch for each; nothing beside them is written."""
    weights = [by_hand(n, K, 64, blocksize2, device) for n in rows]
    N = sum(rows)
    wide = randn(N + 3, K + 5, dtype=dtype)
    expected = wide.clone()
    first = 1
    for w, n in zip(weights, rows, strict=True):
        dequantise(w, expected[first : first + n, 2 : K + 2])
        first += n
    dequantise_rows(weights, wide[1 : N + 1, 2 : K + 2])
    assert torch.equal(wide, expected)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("other", ["blocksize", "nested", "empty", "fourth", None])
def test_weights_of_several_layouts_take_a_launch_each(device, monkeypatch, other):
    first, second = by_hand(16, 128, 64, 256, device), by_hand(8, 128, 64, 256, device)
    weights = {
        "blocksize": [first, by_hand(8, 128, 128, 256, device)],
        "nested": [first, by_hand(8, 128, 64, None, device)],
        "empty": [first, by_hand(0, 128, 64, 256, device)],
        "fourth": [first, second, first, second],
        None: [first, second],
    }[other]
    calls = []
    real = nf4.dequantise
    monkeypatch.setattr(nf4, "dequantise", lambda w, out: calls.append(w) or real(w, out))
    out = torch.empty(sum(w.shape[0] for w in weights), 128, device=device)
    dequantise_rows(weights, out)
    assert len(calls) == (0 if other is None else len(weights))
    torch.testing.assert_close(out, torch.cat([reference(w) for w in weights]))


def test_fp64_out_and_no_elements(device, randn: Randn):
    w, by_bitsandbytes = quantised(randn(8, 64))
    out = torch.empty(8, 64, dtype=torch.float64, device=device)
    dequantise(w, out)
    assert torch.equal(out, by_bitsandbytes(torch.float32).double())
    dequantise(by_hand(0, 64, 64, None, device), torch.empty(0, 64, device=device))


def test_rows_beyond_2_to_the_31_elements(device, randn: Randn):
    """A row that starts at element 2^31 although its number and the stride fit 32 bits."""
    w, by_bitsandbytes = quantised(randn(3, 128))
    far = torch.empty(2**31 + 128, dtype=torch.bfloat16, device=device)
    out = far.as_strided((3, 128), (2**30, 1))
    dequantise(w, out)
    assert_same_bits(out.clone(), by_bitsandbytes(torch.bfloat16))


def test_wrong_parts_are_refused(device):
    w = by_hand(4, 64, 64, 256, device)
    parts = {name: getattr(w, name) for name in w.__dataclass_fields__}
    for change, message in (
        ({"shape": (4, 65)}, r"packed of a \(4, 65\) weight must be 130"),
        ({"packed": w.packed.view(torch.int8)}, "torch.int8"),
        ({"code": w.code[:8]}, "code of a"),
        ({"absmax": w.absmax[:3]}, "absmax of a"),
        ({"absmax2": None}, "some of them are None"),
        ({"blocksize": 48}, "power of two, got 48"),
        ({"absmax": w.absmax.to(torch.bfloat16)}, "torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            Quantised4bit(**(parts | change))
    with pytest.raises(ValueError, match="out must be"):
        dequantise(w, torch.empty(4, 65, device=device))
    with pytest.raises(ValueError, match="contiguous rows"):
        dequantise(w, torch.empty(4, 128, device=device)[:, ::2])
    with pytest.raises(ValueError, match=r"out must be \(8, 64\)"):
        dequantise_rows([w, w], torch.empty(9, 64, device=device))
    with pytest.raises(ValueError, match="contiguous rows"):
        dequantise_rows([w, w], torch.empty(8, 128, device=device)[:, ::2])


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "single"])
@pytest.mark.parametrize(("N", "K"), [(28672, 4096), (4096, 14336), (2048, 5120), (1000, 2560)])
def test_large(cuda, randn: Randn, dtype, N, K, nested):
    W = torch.randn(N, K, dtype=dtype, device=cuda)
    w, by_bitsandbytes = quantised(W, nested=nested)
    wide = torch.empty(N, K + 96, dtype=dtype, device=cuda)
    dequantise(w, wide[:, :K])
    # A GPU may fuse bitsandbytes' multiply and add: one rounding of the scale.
    torch.testing.assert_close(
        wide[:, :K], by_bitsandbytes(dtype), rtol=torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.gpu
def test_weight_beyond_2_to_the_31_elements(cuda):
    N, K, tail = 2**19 + 3, 4096, 8
    w = by_hand(N, K, 64, None, cuda)
    out = torch.empty(N, K, dtype=torch.bfloat16, device=cuda)
    dequantise(w, out)
    last = Quantised4bit(
        w.packed[-tail * K // 2 :], w.code, w.absmax[-tail * K // 64 :], 64, (tail, K)
    )
    assert torch.equal(out[-tail:], reference(last).to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "K"), [((4096, 1024, 1024), 4096), ((14336, 14336), 4096)])
def test_large_groups(cuda, rows, K):
    weights = [quantised(torch.randn(n, K, device=cuda).bfloat16())[0] for n in rows]
    together = torch.empty(sum(rows) + 96, K + 96, dtype=torch.bfloat16, device=cuda)[:-96, :K]
    apart = torch.empty_like(together)
    dequantise_rows(weights, together)
    for w, part in zip(weights, apart.split(rows), strict=True):
        dequantise(w, part)
    assert torch.equal(together, apart)


@pytest.mark.parametrize("nested", [True, False])
def test_experts_into_a_wider_and_taller_buffer(randn, device, dtype, nested) -> None:
    E, N, K = 3, 5, 24
    w, _ = quantised(randn(E * N, K), nested=nested)
    out = torch.full((E, N + 2, K + 8), 7.0, dtype=dtype, device=device)
    dequantise_experts(w, out[:, :N, :K])
    whole = torch.empty(E * N, K, dtype=dtype, device=device)
    dequantise(w, whole)
    assert torch.equal(out[:, :N, :K], whole.view(E, N, K))
    assert (out[:, N:] == 7).all() and (out[:, :, K:] == 7).all(), "wrote outside"
    with pytest.raises(ValueError, match=r"\[E, N, K\]"):
        dequantise_experts(w, out[:, : N - 1, :K])
