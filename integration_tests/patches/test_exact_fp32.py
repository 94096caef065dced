"""Whatever way TF32 was switched on: proofs compute without it, and it is on afterwards."""

from collections.abc import Iterator

import pytest
import torch

from lorafuse.patches import verify
from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.exact_fp32 import exact_fp32

PRODUCTS = torch.backends.cuda.matmul
NEWER = hasattr(PRODUCTS, "fp32_precision")
WAYS = ["legacy", "legacy, off", *(["newer", "newer, all of torch"] if NEWER else [])]


def setting() -> object:
    return PRODUCTS.fp32_precision if NEWER else PRODUCTS.allow_tf32


@pytest.fixture(params=WAYS)
def switched(request: pytest.FixtureRequest) -> Iterator[object]:
    """TF32 switched as users and trainers do; what torch says of it then."""
    everything = torch.backends.fp32_precision if NEWER else None
    before = setting()
    if request.param.startswith("legacy"):
        PRODUCTS.allow_tf32 = request.param == "legacy"
    elif request.param == "newer":
        PRODUCTS.fp32_precision = "tf32"
    else:
        torch.backends.fp32_precision = "tf32"
    yield setting()
    if NEWER:
        torch.backends.fp32_precision = everything
        PRODUCTS.fp32_precision = before
    else:
        PRODUCTS.allow_tf32 = before


def test_it_is_off_within_and_as_before_afterwards(switched) -> None:
    with pytest.raises(ZeroDivisionError), exact_fp32():
        assert setting() in ("ieee", False)
        raise ZeroDivisionError
    assert setting() == switched


def test_a_model_is_proven_all_the_same(switched, make_peft, monkeypatch) -> None:
    seen = []
    run = verify._run
    monkeypatch.setattr(verify, "_run", lambda *args: seen.append(setting()) or run(*args))
    fused = apply(make_peft("llama"), dict.fromkeys(OPERATIONS, True))
    operations = {r.operation for r in fused.records if r.fused}
    assert {"lora_mlp", "lora_qkv", "cross_entropy"} <= operations
    assert seen and set(seen) <= {"ieee", False}
    assert setting() == switched


@pytest.mark.gpu
def test_products_are_exact() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    x = torch.randn(512, 512, device="cuda")
    exact = (x.double() @ x.double()).float()
    before = setting()
    try:
        if NEWER:
            PRODUCTS.fp32_precision = "tf32"
        else:
            PRODUCTS.allow_tf32 = True
        rough = (x @ x - exact).norm() / exact.norm()
        with exact_fp32():
            error = (x @ x - exact).norm() / exact.norm()
    finally:
        setattr(PRODUCTS, "fp32_precision" if NEWER else "allow_tf32", before)
    assert error < 1e-6 < rough
