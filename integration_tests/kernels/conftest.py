"""Fixtures of the kernel tests: where they run, and the rule by which a result counts as right.

The same tests run three ways: on the torch references (plain CPU), on the Triton kernels
interpreted (`TRITON_INTERPRET=1`), and on the Triton kernels for real (a CUDA GPU, where `-m gpu`
adds the large sizes).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafuse.kernels import runtime
from lorafuse.kernels.nf4 import Quantised4bit

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one and Triton is not interpreted, else the CPU."""
    on_gpu = torch.cuda.is_available() and not runtime.interpreting()
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """The GPU, for tests that need one."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    return device


@pytest.fixture(scope="session")
def triton_runs(device: torch.device) -> None:
    """For tests that compare a Triton kernel with the reference, all that plain CPU has."""
    if not runtime.use_triton(torch.empty(1, device=device)):
        pytest.skip("the Triton kernels run on a GPU or with TRITON_INTERPRET=1")


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that the Triton kernels serve."""
    return DTYPES[request.param]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run and every order of tests."""
    torch.manual_seed(0)


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers, drawn on the CPU so that every device sees the same ones."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


@pytest.fixture(scope="session")
def randn(device: torch.device) -> Callable[..., Tensor]:
    """`randn(*shape, dtype=...)` on the device of the tests."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return random_tensor(*shape, dtype=dtype, device=device)

    return make


class Oracle:
    """Our result is right if it is about as far from the fp64 result as plain torch's is.

    err(ours) <= 2 * err(torch at that dtype) + eps, where err is the largest absolute difference
    and eps is one unit in the last place of the largest element.
    """

    def compare(self, name: str, ours: Tensor, stock: Tensor, exact: Tensor) -> None:
        """Apply the rule to one tensor, named in the message."""
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}"
        assert exact.isfinite().all(), f"{name}: the fp64 result is not finite; fix the test"
        if exact.numel() == 0:
            return
        our_error = (ours.double() - exact).abs().max().item()
        stock_error = (stock.double() - exact).abs().max().item()
        # In fp32 no coarse store hides the rest: exp and division are good to about two units in
        # the last place, and a chain of GEMMs rounds a few times more in one order of additions
        # than in another. Triton's interpreter truncates where a GPU rounds fp32 to bf16.
        truncates = ours.dtype == torch.bfloat16 and runtime.interpreting()
        roundings = 6.0 if ours.dtype == torch.float32 else 4.0 if truncates else 2.0
        eps = roundings * torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
        assert our_error <= 2 * stock_error + eps, (
            f"{name} [{ours.dtype}]: error {our_error:.3e}, but torch's is {stock_error:.3e} "
            f"(eps {eps:.3e})"
        )

    def check(
        self,
        ours: Callable[..., Any],
        stock: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        grads: Collection[str],
    ) -> tuple[Tensor, ...]:
        """Compare the outputs and the gradients of the inputs named in `grads`; return our outputs.

        Both functions take the tensors of `inputs` in order. The strides of the inputs are kept.
        """
        before = {name: x.clone() for name, x in inputs.items()}
        wide = {name: x.double() for name, x in inputs.items()}
        our_run = _run(ours, inputs, grads, None)
        stock_run = _run(stock, inputs, grads, our_run.cotangents)
        exact_run = _run(stock, wide, grads, our_run.cotangents)
        for i, outputs in enumerate(
            zip(our_run.outputs, stock_run.outputs, exact_run.outputs, strict=True)
        ):
            self.compare(f"output {i}", *outputs)
        for name in grads:
            runs = (our_run, stock_run, exact_run)
            self.compare(f"gradient of {name}", *(run.grads[name] for run in runs))
            assert our_run.grads[name].dtype == inputs[name].dtype, f"gradient of {name}"
        for name, x in inputs.items():
            assert torch.equal(x, before[name]), f"{name} was written to"
        return our_run.outputs


class _Run:
    """Outputs of one function, and the gradients of one backward pass through it."""

    def __init__(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], grads: Mapping[str, Tensor]
    ) -> None:
        self.outputs = tuple(x.detach() for x in outputs)
        self.cotangents = cotangents
        self.grads = grads


def _run(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    grads: Collection[str],
    cotangents: Sequence[Tensor] | None,
) -> _Run:
    leaves = {name: x.detach().requires_grad_(name in grads) for name, x in inputs.items()}
    result = function(*leaves.values())
    outputs = result if isinstance(result, tuple) else (result,)
    if cotangents is None:
        cotangents = [random_tensor(*y.shape, dtype=y.dtype, device=y.device) for y in outputs]
    if grads:
        pairs = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [dy.to(y.dtype) for y, dy in pairs])
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert set(found) == set(grads), f"gradients of {sorted(found)}, expected {sorted(grads)}"
    return _Run(outputs, cotangents, found)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """The rule; see `Oracle`."""
    return Oracle()


def four_bit(
    W: Tensor, quant_type: str = "nf4", nested: bool = True, blocksize: int = 64
) -> Quantised4bit:
    """W as bitsandbytes quantises it."""
    bnb_functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb_functional.quantize_4bit(
        W.contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    second = state.state2
    return Quantised4bit(
        packed.view(torch.uint8).flatten(), state.code, state.absmax, blocksize,
        (W.shape[0], W.shape[1]),
        *((second.code, second.absmax, state.offset, second.blocksize) if nested else ()),
    )  # fmt: skip
