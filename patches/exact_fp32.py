"""Products in fp32 that are in fp32: without TF32, which a trainer may have switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["exact_fp32"]


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Within, no product in fp32 is in TF32; afterwards torch's setting is as before.

    Newer torch has two settings for one thing, and reading the older one is an error where the
    newer one was used, as transformers does.
    """
    products: Any = torch.backends.cuda.matmul
    newer = hasattr(products, "fp32_precision")
    name, exact = ("fp32_precision", "ieee") if newer else ("allow_tf32", False)
    before = getattr(products, name)
    setattr(products, name, exact)
    try:
        yield
    finally:
        setattr(products, name, before)
