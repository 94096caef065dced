"""lorafuse's own features, as a plugin that is registered the way a third party's is."""

from collections.abc import Sequence
from typing import Any

from lorafuse.patches.apply import BUILTIN_STRUCTURES, BUILTIN_WEIGHT_FORMATS
from lorafuse.plugin.hookspecs import hookimpl


@hookimpl(trylast=True)
def lorafuse_structures() -> Sequence[Any]:
    """The blocks of a pre-norm decoder."""
    return BUILTIN_STRUCTURES


@hookimpl(trylast=True)
def lorafuse_weight_formats() -> Sequence[Any]:
    """Plain 32 and 16-bit weights and bitsandbytes' 4-bit ones."""
    return BUILTIN_WEIGHT_FORMATS
