"""What the sweeps of a kernel's settings share."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType


def load(path: str) -> ModuleType:
    """An older form of a kernel's file."""
    spec = importlib.util.spec_from_file_location("before", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["before"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


def compile_in_processes(command: Sequence[str]) -> None:
    """Fills Triton's cache: `command --share I OF` in each of so many processes as there are cores.

    Args:
        command: runs the sweep's script; with `--share` it only compiles its part.
    """
    processes = min(14, max(1, (os.cpu_count() or 2) - 2))
    shares = [
        subprocess.Popen([*command, "--share", str(i), str(processes)]) for i in range(processes)
    ]
    for share in shares:
        share.wait()
