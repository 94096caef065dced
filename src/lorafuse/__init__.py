"""lorafuse: faster, smaller LoRA and QLoRA fine-tuning inside Axolotl and TRL.

The public names load on first use, so that `import lorafuse` imports neither triton nor axolotl nor
trl, and changes nothing anywhere.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafuse.plugin.axolotl import LorafusePlugin
    from lorafuse.plugin.config import FuseConfig
    from lorafuse.plugin.fuse import fuse
    from lorafuse.plugin.report import FuseReport
    from lorafuse.plugin.trl import LorafuseCallback

__version__ = "0.1.0"
__all__ = ["FuseConfig", "FuseReport", "LorafuseCallback", "LorafusePlugin", "__version__", "fuse"]

_HOME = {
    "FuseConfig": "config",
    "FuseReport": "report",
    "LorafuseCallback": "trl",
    "LorafusePlugin": "axolotl",
    "fuse": "fuse",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lorafuse' has no attribute {name!r}")
    return getattr(import_module(f"lorafuse.plugin.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
