"""Which versions and which GPU a report was made with."""

from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("lorafuse", "torch", "triton", "transformers", "peft", "trl", "axolotl", "bitsandbytes")


def versions() -> dict[str, str | None]:
    """The installed version of each package that matters here; None where it is not installed."""
    found = {name: _version(name) for name in PACKAGES}
    return found | {"lorafuse": found["lorafuse"] or "(from source, not installed)"}


def gpu_name() -> str | None:
    """The name of the current GPU, or None on a machine without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
