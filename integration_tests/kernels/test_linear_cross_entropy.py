"""Linear cross-entropy against torch's own, with all logits at once: loss, every gradient,
by-products."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafuse.kernels import cross_entropy_rows
from lorafuse.kernels.linear_cross_entropy import (
    CrossEntropyOptions,
    LinearCrossEntropy,
    chunk_rows,
    linear_cross_entropy,
    reference,
)

NAMES = ("hidden", "weight", "bias", "lora_A", "lora_B")
OPTIONS = {
    "plain": CrossEntropyOptions(),
    "smoothing": CrossEntropyOptions(label_smoothing=0.1),
    "scale": CrossEntropyOptions(logit_scale=0.25),
    "softcap": CrossEntropyOptions(logit_softcap=3.0),
    "z-loss": CrossEntropyOptions(z_loss=1e-2),
    "all": CrossEntropyOptions(
        label_smoothing=0.2, logit_scale=1.7, logit_softcap=5.0, z_loss=1e-3, ignore_index=7
    ),
}
SCALE = 0.5


def torch_loss(options: CrossEntropyOptions, reduction: Any = "mean", divisor: Any = None) -> Any:
    """The same loss from torch's building blocks: what an unfused model computes."""

    def loss(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        A: Tensor | None = None,
        B: Tensor | None = None,
        *,
        labels: Tensor,
    ) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        if A is not None and B is not None:
            logits = logits + SCALE * F.linear(F.linear(hidden, A), B)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits * options.logit_scale
        if options.logit_softcap is not None:
            logits = options.logit_softcap * torch.tanh(logits / options.logit_softcap)
        kept = labels != options.ignore_index
        total = F.cross_entropy(
            logits,
            labels,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="sum",
        )
        total = total + options.z_loss * (logits.logsumexp(-1).square() * kept).sum()
        if divisor is not None:
            return total / divisor
        return total / kept.sum() if reduction == "mean" else total

    return loss


def make_labels(T: int, V: int, device: torch.device, ignore_index: int = -100) -> Tensor:
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    labels[1::3] = ignore_index
    return labels.to(device)


def make_inputs(
    randn: Any, T: int, H: int, V: int, R: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        "hidden": randn(T, H, dtype=dtype),
        "weight": randn(V, H, dtype=dtype) / H**0.5,
        "bias": randn(V, dtype=dtype),
        "lora_A": randn(R, H, dtype=dtype) / H**0.5,
        "lora_B": randn(V, R, dtype=dtype) / R**0.5,
    }


def check(
    oracle: Any,
    inputs: dict[str, Tensor],
    labels: Tensor,
    wanted: tuple[str, ...],
    options: CrossEntropyOptions,
    reduction: Any = "mean",
    divisor: Any = None,
) -> None:
    """Each gradient by the oracle's rule. The loss is one number, a sum in which stock's errors may
    happen to cancel: its limit is what they come to without cancelling, row by row.
    """
    stock = torch_loss(options, reduction, divisor)

    def ours(hidden: Tensor, weight: Tensor, *rest: Tensor, labels: Tensor) -> Tensor:
        bias, A, B = rest if len(rest) == 3 else (None, None, None)
        return linear_cross_entropy(
            hidden, weight, labels, options, bias, divisor, A, B, SCALE, reduction
        ).loss

    before = {name: x.clone() for name, x in inputs.items()}
    wide = {name: x.double() for name, x in inputs.items()}
    losses, gradients = [], []
    for function, values in ((ours, inputs), (stock, inputs), (stock, wide)):
        leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in values.items()}
        losses.append(function(*leaves.values(), labels=labels))
        asked = [leaves[n] for n in wanted]
        gradients.append(torch.autograd.grad(losses[-1] * -1.5, asked))
    for name, *runs in zip(wanted, *gradients, strict=True):
        assert runs[0].dtype == inputs[name].dtype
        oracle.compare(f"gradient of {name}", *runs)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), f"{name} was written to"

    row = torch_loss(options, "sum")
    apart = 0.0
    for m in (labels != options.ignore_index).nonzero()[:, 0].tolist():
        one = [
            row(values["hidden"][m : m + 1], *list(values.values())[1:], labels=labels[m : m + 1])
            for values in (inputs, wide)
        ]
        apart += abs(one[0].double() - one[1]).item()
    by_row = row(*wide.values(), labels=labels)
    limit = 2 * apart * (losses[2] / by_row).item() + 1e-6 * abs(losses[2].item())
    assert abs(losses[0].double() - losses[2]).item() <= limit


@pytest.mark.parametrize("name", OPTIONS)
def test_every_gradient_and_option(oracle, randn, device, dtype, name):
    options = OPTIONS[name]
    inputs = make_inputs(randn, 23, 40, 123, 3, dtype)
    labels = make_labels(23, 123, device, options.ignore_index)
    check(oracle, inputs, labels, NAMES, options)


@pytest.mark.parametrize(
    "wanted",
    [("hidden",), ("weight",), ("bias",), ("lora_A", "lora_B"), ("lora_B",), ("hidden", "lora_A")],
    ids="-".join,
)
def test_subsets_of_gradients(oracle, randn, device, dtype, wanted):
    inputs = make_inputs(randn, 11, 16, 57, 2, dtype)
    check(oracle, inputs, make_labels(11, 57, device, 7), wanted, OPTIONS["all"])


@pytest.mark.parametrize("reduction, divisor", [("sum", None), ("mean", 37), ("sum", 5)])
def test_normalisation(oracle, randn, device, dtype, reduction, divisor):
    inputs = make_inputs(randn, 12, 16, 33, 2, dtype)
    inputs = {name: inputs[name] for name in ("hidden", "weight")}
    labels = make_labels(12, 33, device)
    check(oracle, inputs, labels, ("hidden", "weight"), OPTIONS["plain"], reduction, divisor)
    if divisor is not None:
        as_tensor = torch.tensor(divisor, device=device)
        hidden, weight = inputs.values()
        losses = [
            linear_cross_entropy(hidden, weight, labels, divisor=d).loss
            for d in (divisor, as_tensor)
        ]
        assert torch.equal(*losses)


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 4000, 10**6])
def test_chunks_change_nothing(randn, device, chunk_bytes):
    inputs = make_inputs(randn, 29, 16, 123, 2, torch.float32)
    labels = make_labels(29, 123, device)
    runs = []
    for limit in (None, chunk_bytes):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        options = CrossEntropyOptions(chunk_bytes=limit)
        out = linear_cross_entropy(
            leaves[0], leaves[1], labels, options, leaves[2], None, leaves[3], leaves[4], SCALE
        )
        runs.append([out.loss, *torch.autograd.grad(out.loss, leaves), out.row_entropy])
    for whole, chunked in zip(*runs, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_chunk_rows_keeps_the_limit_and_shares_evenly():
    assert chunk_rows(8192, 128256, 2, 512 * 2**20) == 2048
    assert chunk_rows(2100, 128256, 2, 512 * 2**20) == 1152  # not 2048 and a rest of 52
    assert chunk_rows(5, 128256, 2, 512 * 2**20) == 5
    assert chunk_rows(8192, 262144, 4, 1000) == 1
    for n in (1, 100, 129, 4097, 100_000):
        for vocabulary in (50257, 262144):
            rows = chunk_rows(n, vocabulary, 2, 2**28)
            assert 1 <= rows <= n or rows <= 128
            assert rows * vocabulary * 2 <= 2**28


def test_by_products(randn, device, dtype):
    inputs = make_inputs(randn, 40, 32, 97, 2, dtype)
    labels = make_labels(40, 97, device)
    hidden, weight = inputs["hidden"], inputs["weight"]
    out = linear_cross_entropy(hidden, weight, labels)
    logits = F.linear(hidden, weight).double()
    kept = (labels != -100).nonzero()[:, 0]
    log_p = torch.log_softmax(logits[kept], -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(out.row_entropy[kept].double(), entropy, rtol=1e-5, atol=1e-5)
    assert not out.row_entropy[labels == -100].any()
    torch.testing.assert_close(out.entropy_sum.double(), entropy.sum(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.labelled, labels != -100)
    assert torch.equal(out.row_prediction[kept], logits[kept].argmax(-1))
    assert out.num_valid_tokens == kept.numel()
    assert out.num_correct_tokens == (logits[kept].argmax(-1) == labels[kept]).sum()
    assert not any(x.requires_grad for x in (out.entropy_sum, out.num_correct_tokens))


@pytest.mark.parametrize("more", [0, 3, 10**6])
def test_a_bound_on_the_rows_changes_nothing(randn, device, more):
    """Rows that fill up to `max_rows` repeat a labelled row, and must not count."""
    inputs = make_inputs(randn, 29, 16, 123, 2, torch.float32)
    labels = make_labels(29, 123, device)
    labels[0] = 5
    labels[-1] = -100
    bound = int((labels != -100).sum()) + more
    runs = []
    for max_rows in (None, bound):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        options = CrossEntropyOptions(label_smoothing=0.1, z_loss=1e-3, chunk_bytes=4000)
        out = linear_cross_entropy(
            leaves[0], leaves[1], labels, options, leaves[2], None, leaves[3], leaves[4], SCALE,
            max_rows=max_rows,
        )  # fmt: skip
        runs.append([*vars(out).values(), *torch.autograd.grad(out.loss, leaves)])
    for exact, bounded in zip(*runs, strict=True):
        torch.testing.assert_close(bounded, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_rows", [0, 4, 50])
def test_a_bound_and_no_labels(randn, device, max_rows):
    hidden = randn(9, 8).requires_grad_()
    labels = torch.full((9,), -100, device=device)
    for reduction, loss in (("sum", 0.0), ("mean", float("nan"))):
        out = linear_cross_entropy(
            hidden, randn(20, 8), labels, reduction=reduction, max_rows=max_rows
        )
        torch.testing.assert_close(float(out.loss), loss, equal_nan=True)
        assert not torch.autograd.grad(out.loss, hidden)[0].any()


def test_a_bound_that_is_too_low_is_seen(randn, device):
    labels = torch.arange(9, device=device)
    out = linear_cross_entropy(randn(9, 8), randn(20, 8), labels, max_rows=8)
    assert out.loss.isnan()


def test_ties_go_to_the_first_word(device):
    hidden = torch.ones(2, 4, device=device)
    weight = torch.zeros(300, 4, device=device)
    weight[[17, 250]] = 1.0
    labels = torch.tensor([17, 250], device=device)
    out = linear_cross_entropy(hidden, weight, labels)
    assert out.row_prediction.tolist() == [17, 17]
    assert out.num_correct_tokens == 1


@pytest.mark.parametrize("reduction, divisor", [("mean", None), ("sum", None), ("mean", 9)])
def test_no_labels_as_torch(randn, device, reduction, divisor):
    labels = torch.full((6,), -100, device=device)
    results = []
    for function in (linear_cross_entropy, None):
        hidden = randn(6, 8).requires_grad_()
        weight = randn(11, 8).requires_grad_()
        if function is None:
            mode = "sum" if divisor else reduction
            loss = F.cross_entropy(hidden @ weight.t(), labels, reduction=mode) / (divisor or 1)
        else:
            out = function(hidden, weight, labels, divisor=divisor, reduction=reduction)
            loss = out.loss
            assert out.num_valid_tokens == out.num_correct_tokens == out.entropy_sum == 0
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), torchs.isnan())
        assert torch.equal(ours.nan_to_num(), torchs.nan_to_num())


def test_backward_twice_and_upstream_factor(randn, device):
    hidden, weight = randn(9, 8).requires_grad_(), randn(31, 8)
    labels = make_labels(9, 31, device)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(8 * loss, hidden)
    assert torch.equal(once, again)
    torch.testing.assert_close(scaled, 8 * once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_large_divisor_does_not_underflow(oracle, randn, device, dtype):
    """16-bit dlogits divided by num_items_in_batch would lose most words in fp16."""
    inputs = make_inputs(randn, 16, 64, 500, 2, dtype)
    inputs = {"hidden": inputs["hidden"], "weight": inputs["weight"]}
    labels = make_labels(16, 500, device)
    hidden = inputs["hidden"].clone().requires_grad_()
    out = linear_cross_entropy(hidden, inputs["weight"], labels, divisor=100_000)
    (ours,) = torch.autograd.grad(out.loss * 65536, hidden)  # a gradient scaler's factor
    exact = inputs["hidden"].double().requires_grad_()
    stock = torch_loss(OPTIONS["plain"], divisor=100_000)
    loss = stock(exact, inputs["weight"].double(), labels=labels)
    (expected,) = torch.autograd.grad(loss * 65536, exact)
    error = (ours.double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps, error


def test_16_bit_gradients_are_not_all_off_by_one_factor(randn, device):
    """The factor 1/divisor must not be rounded to 16 bit: the gradient norm would move by up to
    0.4%."""
    hidden = randn(64, 32, dtype=torch.bfloat16).requires_grad_()
    weight = randn(99, 32, dtype=torch.bfloat16)
    labels = make_labels(64, 99, device)
    (unit,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, divisor=1).loss, hidden
    )
    divisor = 253  # 1 / 253 is not a bf16 number
    (ours,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, divisor=divisor).loss, hidden
    )
    ratio = (ours.double() * unit.double()).sum() / unit.double().square().sum() * divisor
    # rounded to bf16, the factor would be off by 3.7e-3
    assert abs(ratio - 1) < 1.5e-3, ratio


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(randn, device, head):
    hidden = randn(13, 32).requires_grad_()
    weight = (randn(67, 32) / 6).to(head).requires_grad_()
    labels = make_labels(13, 67, device)
    with torch.autocast(device.type, torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels).loss
        logits = F.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        stock = F.cross_entropy(logits.float(), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    pairs = zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(stock, (hidden, weight)),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).float().norm() < 0.02 * theirs.float().norm()


def test_strided_inputs(oracle, randn, device, dtype):
    wide = randn(10, 3 * 24, dtype=dtype)
    inputs = {"hidden": wide[:, 24:48], "weight": randn(24, 71, dtype=dtype).t() / 5}
    check(oracle, inputs, make_labels(10, 71, device), ("hidden", "weight"), OPTIONS["plain"])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("wanted", [NAMES, ("hidden",)], ids="-".join)
def test_gradcheck(randn, device, name, wanted):
    options = OPTIONS[name]
    inputs = make_inputs(randn, 6, 5, 9, 2, torch.float64)
    labels = make_labels(6, 9, device, options.ignore_index)
    leaves = [x.requires_grad_(n in wanted) for n, x in inputs.items()]

    def loss(hidden, weight, bias, A, B):
        return linear_cross_entropy(hidden, weight, labels, options, bias, None, A, B, SCALE).loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # inputs without a gradient
        assert torch.autograd.gradcheck(loss, leaves)


def test_the_reference_is_torchs_loss(randn, device):
    for options in OPTIONS.values():
        inputs = make_inputs(randn, 14, 12, 51, 3, torch.float64)
        labels = make_labels(14, 51, device, options.ignore_index)
        expected = torch_loss(options)(*inputs.values(), labels=labels)
        hidden, weight, bias, A, B = inputs.values()
        got = reference(hidden, weight, labels, options, bias, None, A, B, SCALE)
        ours = linear_cross_entropy(hidden, weight, labels, options, bias, None, A, B, SCALE)
        torch.testing.assert_close(got.loss, expected)
        for field in LinearCrossEntropy.__dataclass_fields__:
            torch.testing.assert_close(getattr(ours, field), getattr(got, field))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 40),
    H=st.integers(1, 20),
    V=st.integers(2, 300),
    limit=st.integers(1, 40_000),
    softcap=st.sampled_from([None, 2.0]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_size(device, T, H, V, limit, softcap, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator).to(device).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(device).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < ignored] = -100
    labels = labels.to(device)
    options = CrossEntropyOptions(logit_softcap=softcap, chunk_bytes=limit)
    ours = linear_cross_entropy(hidden, weight, labels, options, reduction="sum").loss
    stock = torch_loss(options, "sum")(hidden, weight, labels=labels)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(x, (hidden, weight)) for x in (ours, stock)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_no_gradient_no_work(randn, device, monkeypatch):
    """In evaluation, and for a leaf without gradients, the logits are never turned into
    gradients."""
    asked = []
    rows = cross_entropy_rows.cross_entropy_rows_

    def spy(*args):
        asked.append(args[-1])
        rows(*args)

    monkeypatch.setattr("lorafuse.kernels.linear_cross_entropy.cross_entropy_rows_", spy)
    hidden, weight, labels = randn(5, 8), randn(13, 8), make_labels(5, 13, device)
    assert not linear_cross_entropy(hidden, weight, labels).loss.requires_grad
    with torch.no_grad():
        linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert asked == [False, False]
    linear_cross_entropy(hidden, weight, labels)
    assert asked[2:] == [True]


def both_ways(
    z: Tensor, labels: Tensor, options: CrossEntropyOptions, gradient: bool
) -> list[list[Tensor]]:
    """[loss, entropy, prediction, z afterwards] by the Triton kernel and by torch."""
    outputs = []
    for rows in (cross_entropy_rows._triton_rows_, cross_entropy_rows._torch_rows_):
        own = z.clone(memory_format=torch.preserve_format)
        loss, entropy = (torch.empty(z.shape[0], device=z.device) for _ in range(2))
        prediction = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
        rows(own, labels, options, loss, entropy, prediction, gradient)
        outputs.append([loss, entropy, prediction, own])
    return outputs


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("block", [128, None], ids=["several tiles", "one tile"])
def test_triton_rows_match_the_reference(
    triton_runs, randn, device, dtype, monkeypatch, block, gradient
):
    if block is not None:
        monkeypatch.setattr(cross_entropy_rows, "_BLOCK_V", block)
    for options in OPTIONS.values():
        for V in (1, 31, 128, 512, 1000):
            z = randn(5, V + 3, dtype=dtype)[:, :V]
            words = [0, V // 2, min(V - 1, 130), V - 1, options.ignore_index]
            labels = torch.tensor(words, device=device)
            outputs = both_ways(z, labels, options, gradient)
            for triton_result, torch_result in zip(*outputs, strict=True):
                eps = 2 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    triton_result.double(), torch_result.double(), rtol=eps, atol=max(eps, 3e-6)
                )


@pytest.mark.parametrize("gradient", [True, False])
def test_extreme_rows_over_several_tiles(triton_runs, randn, device, monkeypatch, gradient):
    """-inf words, a tie between tiles, a maximum that grows from tile to tile; NaN stays loud."""
    monkeypatch.setattr(cross_entropy_rows, "_BLOCK_V", 128)
    V, options = 500, CrossEntropyOptions()
    z = randn(6, V)
    z[0, ::2] = float("-inf")
    z[0, :128] = float("-inf")
    z[1, [100, 300]] = 9.0
    z[2] = torch.linspace(-300, 300, V, device=device)
    z[3] = -z[2]
    z[4, 200] = float("inf")  # ignored
    z[5, 200] = float("nan")
    labels = torch.tensor([129, 300, V - 1, 3, -100, 5], device=device)
    ours, expected = both_ways(z, labels, options, gradient)
    for mine, theirs in zip(ours, expected, strict=True):
        # Logits of 300 have a last bit of 3e-5.
        torch.testing.assert_close(mine[:4], theirs[:4], rtol=1e-5, atol=6e-5)
    assert int(ours[2][1]) == 100
    assert ours[0][4] == 0 and ours[1][4] == 0
    assert ours[0][5].isnan()
    if gradient:
        assert not ours[3][4].any() and ours[3][5].isnan().all()


def test_a_wrong_label_is_loud(randn, device):
    labels = torch.tensor([1, 99, 2], device=device)
    try:
        loss = linear_cross_entropy(randn(3, 4), randn(9, 4), labels).loss
    except (IndexError, RuntimeError):
        return
    assert loss.isnan()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": (2, 3, 4)}, "hidden must be"),
        ({"weight": (9, 5)}, "hidden must be"),
        ({"labels": (4,)}, "labels must be"),
        ({"bias": (4,)}, "bias must be"),
        ({"lora_A": (2, 4)}, "come together"),
        ({"lora_A": (2, 4), "lora_B": (9, 3)}, "lora_A must be"),
    ],
)
def test_wrong_shapes(device, change, message):
    shapes = {"hidden": (3, 4), "weight": (9, 4), "labels": (3,)} | change
    arguments = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    arguments["labels"] = arguments["labels"].long()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_wrong_dtypes_and_options(device):
    hidden, labels = (
        torch.zeros(3, 4, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
    )
    with pytest.raises(ValueError, match=r"float32 and weight torch\.bfloat16"):
        linear_cross_entropy(hidden, torch.zeros(9, 4, dtype=torch.bfloat16, device=device), labels)
    with pytest.raises(ValueError, match="dequantise"):
        linear_cross_entropy(hidden, torch.zeros(9, 4, dtype=torch.uint8, device=device), labels)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, hidden, labels, reduction="none")
    for wrong in ({"label_smoothing": 2.0}, {"logit_softcap": 0.0}, {"chunk_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CrossEntropyOptions(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [128256, 262144, 50257])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_vocabulary(oracle, cuda, V, softcap):
    T, H = 300, 512
    generator = torch.Generator(cuda).manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, device=cuda).bfloat16()
    weight = (torch.randn(V, H, generator=generator, device=cuda) / H**0.5).bfloat16()
    options = CrossEntropyOptions(logit_softcap=softcap, chunk_bytes=2**26)
    inputs = {"hidden": hidden, "weight": weight}
    check(oracle, inputs, make_labels(T, V, cuda), ("hidden", "weight"), options)


@pytest.mark.gpu
def test_peak_memory_and_one_synchronisation(cuda):
    T, H, V = 4096, 1024, 128256
    hidden = torch.randn(T, H, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, device=cuda, dtype=torch.bfloat16) / 32
    labels = make_labels(T, V, cuda)
    linear_cross_entropy(hidden, weight, labels).loss.backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = linear_cross_entropy(hidden, weight, labels).loss
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 1, waits
    # the logits buffer and a few [T, H]; all logits at once would be 1 GB, and 2 GB more in fp32
    assert torch.cuda.max_memory_allocated() - before < 512 * 2**20 + 8 * T * H * 2
