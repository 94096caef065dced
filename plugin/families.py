"""`lorafuse families`: every family of transformers, tried with a tiny model on the CPU.

Two mappings of transformers: causal LMs, and models of images and text.

Each family has a process of its own with a time limit, so that one that hangs, dies or fills the
memory costs itself alone. The processes are forked from one that has imported everything.
"""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from lorafuse.plugin.environment import versions
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.family_trial import (
    CRASHED,
    IMAGE_TEXT,
    LEVELS,
    NOT_BUILT,
    PROJECTIONS,
    WRONG,
    Family,
    try_family,
)

LIMIT_s = 180.0
# Auto class -> model type -> class.
MAPPINGS: dict[str, dict[str, Any]] = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    IMAGE_TEXT: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
# What the command calls them.
KINDS = {"causal": "AutoModelForCausalLM", "image-text": IMAGE_TEXT}
Progress = Callable[[Family, int, int], None]
Trial = Callable[[str, str, str, Callable[[], None]], Family]
_BUILT = "built"


@dataclass(frozen=True)
class Families:
    """The sweep's results, in the mapping's order."""

    families: Sequence[Family]
    when: datetime

    def of(self, images: bool) -> "Families":
        """Those of one mapping: of images and text, or causal LMs."""
        return replace(self, families=[f for f in self.families if f.images == images])

    @property
    def levels(self) -> Counter[str]:
        return Counter(family.level for family in self.families)

    @property
    def bad(self) -> list[Family]:
        """What trains wrong, or crashes because of lorafuse."""
        return [family for family in self.families if family.level in (WRONG, CRASHED)]

    @property
    def built(self) -> list[Family]:
        return [family for family in self.families if family.level != NOT_BUILT]

    @property
    def expected(self) -> list[Family]:
        """Whose blocks hold a gated MLP and q/k/v/o attention."""
        return [f for f in self.built if set(f.expected) == set(PROJECTIONS)]

    @property
    def covered(self) -> list[Family]:
        """Of `expected`, those that fuse at least the MLP, q/k/v and o."""
        return [f for f in self.expected if set(PROJECTIONS) <= set(f.operations)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "date": self.when.date().isoformat(),
            "versions": versions(),
            **self.of(images=False).counts(),
            "image_text": self.of(images=True).counts(),
            "families": [family.to_dict() for family in self.families],
        }

    def counts(self) -> dict[str, Any]:
        return {
            "levels": {level: self.levels[level] for level in LEVELS},
            "expected": len(self.expected),
            "covered": len(self.covered),
        }


def model_types(only: str | None = None, kind: str | None = None) -> list[tuple[str, str, str]]:
    """(model type, class, auto class) of each family, or of those named.

    Args:
        only: model types or classes, separated by commas; None: all.
        kind: one of `KINDS`; None: all.

    Raises:
        FuseConfigError: a name or a kind that is not known.
    """
    if kind is not None and kind not in KINDS:
        raise FuseConfigError(f"--kind {kind}: give {' or '.join(KINDS)}, or leave it out for both")
    known = [
        (model_type, str(name), auto)
        for auto, mapping in MAPPINGS.items()
        for model_type, name in mapping.items()
        if kind is None or auto == KINDS[kind]
    ]
    if only is None:
        return known
    asked = [name.strip() for name in only.split(",") if name.strip()]
    for name in asked:
        if not any(name in entry[:2] for entry in known):
            raise FuseConfigError(
                f"--only {name}: transformers {transformers.__version__} has no such model type "
                "or class in its mappings for causal LMs and for images and text"
            )
    return [entry for entry in known if entry[0] in asked or entry[1] in asked]


@dataclass
class _Running:
    """A process that tries one family."""

    index: int
    process: Any
    end: float  # of its time
    built: bool = False


def sweep(
    entries: Sequence[tuple[str, str, str]],
    jobs: int = 1,
    limit_s: float = LIMIT_s,
    progress: Progress = lambda family, done, whole: None,
    trial: Trial = try_family,
) -> Families:
    """Tries each family.

    Args:
        entries: as of `model_types`.
        jobs: processes at a time, of one thread each.
        limit_s: for one family.
        progress: told of each result, with how many there are and will be.
        trial: what a process does; a function of a module.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorafuse.plugin.family_trial"])
    waiting, found = list(reversed(range(len(entries)))), dict[int, Family]()
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, trial, entries[index]))
                process.start()
                theirs.close()
                running[ours] = _Running(index, process, time.monotonic() + limit_s)
            soonest = min(one.end for one in running.values())
            ready = wait(list(running), max(0.0, soonest - time.monotonic()))
            for ours, one in list(running.items()):
                reason = None
                if ours in ready:
                    try:
                        said = ours.recv()
                    except EOFError:
                        one.process.join()
                        reason = f"its process ended with code {one.process.exitcode}"
                    else:
                        if said == _BUILT:
                            one.built = True
                            continue
                        found[one.index] = said
                elif time.monotonic() >= one.end:
                    reason = f"it took longer than {limit_s:g} s"
                else:
                    continue
                if reason is not None:
                    level = CRASHED if one.built else NOT_BUILT
                    model_type, name, auto = entries[one.index]
                    found[one.index] = Family(
                        model_type, name, level, reason, images=auto == IMAGE_TEXT
                    )
                one.process.kill()
                one.process.join()
                ours.close()
                del running[ours]
                progress(found[one.index], len(found), len(entries))
    finally:
        for one in running.values():
            one.process.kill()
    return Families([found[i] for i in sorted(found)], datetime.now(UTC))


def _work(
    connection: Connection,
    trial: Trial,
    entry: tuple[str, str, str],
) -> None:
    """In the process of one family: sends that its stock step works, and then the result."""
    torch.set_num_threads(1)
    connection.send(trial(*entry, lambda: connection.send(_BUILT)))
    connection.close()
