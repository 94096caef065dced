"""Where lorafuse's lines go: its own logger, from the main process only.

The logger gets its own handler. Axolotl drops the INFO records of every logger that is not its own,
and transformers leaves the root logger silent, while a report that nobody sees proves nothing.
`logging.getLogger("lorafuse").setLevel(logging.WARNING)` silences it.
"""

import logging
import os
import sys
from typing import TextIO

import torch


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: Axolotl puts its debug log there later on."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("this handler always writes to sys.stderr")


def is_main_process() -> bool:
    """Whether this process is the one that speaks and writes files."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def info(message: str) -> None:
    """Logs a line (or a table) from the main process."""
    if is_main_process():
        _logger().info(message)


def warning(message: str) -> None:
    """Logs a warning from the main process."""
    if is_main_process():
        _logger().warning(message)


def _logger() -> logging.Logger:
    logger = logging.getLogger("lorafuse")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("[lorafuse] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
        # Axolotl's logger class comes with a filter that drops our INFO records.
        logger.filters.clear()
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    return logger
