"""`FuseReport`: what was asked for, what was fused, what was really called, and why not.

The counts are read from the fused model whenever they are asked for, so the same report says more
after the first step than right after fusing.
"""

import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from lorafuse.plugin import log
from lorafuse.plugin.config import FP8, GRAPHS, PREFIX, TRAVERSAL, FuseConfig
from lorafuse.plugin.environment import gpu_name, versions
from lorafuse.plugin.errors import FuseError

FILE_NAME = "lorafuse_report.json"


class Record(Protocol):
    """What the engine says about one operation of one module (`patches/apply.py`)."""

    @property
    def operation(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def fused(self) -> bool: ...
    @property
    def level(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def stock_calls(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Reason:
    """Why some modules of an operation run as stock.

    Attributes:
        reason: The reason, the same for all of them.
        modules: How many modules.
        first: The qualified name of the first, "" where the operation was found nowhere.
        calls: How many calls fell back, 0 where the module was never fused.
    """

    reason: str
    modules: int
    first: str
    calls: int = 0

    def __str__(self) -> str:
        if not self.first:
            return self.reason
        where = self.first if self.modules == 1 else f"{self.modules} modules, first {self.first}"
        return f"{self.reason} ({where})"


@dataclass(frozen=True)
class OperationReport:
    """One operation over the whole model.

    Attributes:
        asked: The flag's value is on.
        found: Modules that the operation could stand in.
        fused: Modules where it does.
        called: Fused modules whose fused form has run at least once.
        calls: All runs of the fused form.
        levels: How many were fused as part of a whole decoder `layer`, or as a `part` on their own.
        fallbacks: Modules that were not fused.
        runtime_fallbacks: Fused modules that ran some calls as stock.
    """

    asked: bool
    found: int = 0
    fused: int = 0
    called: int = 0
    calls: int = 0
    levels: dict[str, int] = field(default_factory=dict)
    fallbacks: list[Reason] = field(default_factory=list)
    runtime_fallbacks: list[Reason] = field(default_factory=list)


class FuseReport:
    """What `fuse` did to one model.

    Args:
        config: The flags.
        records: The engine's records, which count calls as they happen.
        unfuse: Takes everything off the model again.
        notes: Lines that belong to no single operation.
        fp8_noise: Signal to noise of FP8 products, a dataclass, where FP8 is on.
        checkpointing: The engine's `Checkpointing`, where decoder layers are fused whole.
        masks: What became of attention masks so far, and in how many calls.
        proofs: How many distinct blocks were compared with stock.
        proving_s: The time that finding and proving blocks took.
    """

    def __init__(
        self,
        config: FuseConfig,
        records: Sequence[Record],
        unfuse: Callable[[], None],
        notes: Sequence[str] = (),
        fp8_noise: Any = None,
        checkpointing: Any = None,
        masks: Callable[[], Mapping[str, int]] = dict,
        proofs: int = 0,
        proving_s: float = 0.0,
    ) -> None:
        self.config = config
        self.notes = list(notes)
        self.fp8_noise = fp8_noise
        self.checkpointing = checkpointing
        self.masks = masks
        self.proofs = proofs
        self.proving_s = proving_s
        self.steps = 0
        self._records = records
        self._unfuse = unfuse
        self._undo: list[Callable[[], None]] = []

    def unfuse(self) -> None:
        """Restores the model exactly as it was before fusing. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self._unfuse()

    def add(self, record: Record, undo: Callable[[], None] | None = None) -> None:
        """Takes up what was fused beside the model, as the optimiser; `undo` takes it off again."""
        self._records = [*self._records, record]
        if undo is not None:
            self._undo.append(undo)

    def note(self, line: str) -> None:
        """Adds a line that belongs to no single operation, once."""
        if line not in self.notes:
            self.notes.append(line)

    def operations(
        self, holds: Callable[[str], bool] = lambda module: True
    ) -> dict[str, OperationReport]:
        """The state of each operation, by its name without `fused_`.

        Args:
            holds: Of a module's qualified name: whether it counts.
        """
        records: defaultdict[str, list[Record]] = defaultdict(list)
        for record in self._records:
            if holds(record.module):
                records[record.operation].append(record)
        enabled = self.config.enabled()
        return {
            name: _summarise(enabled.get(name, True), records[name])
            for name in [*enabled, *(name for name in records if name not in enabled)]
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything that the report says, in plain types."""
        return {
            "versions": versions(),
            "gpu": gpu_name(),
            "config": self.config.model_dump(),
            "steps": self.steps,
            "operations": {name: asdict(one) for name, one in self.operations().items()},
            "notes": self.notes,
            "attention_masks": dict(self.masks()),
            "verification": {"blocks": self.proofs, "seconds": round(self.proving_s, 3)},
            "fp8_noise": None if self.fp8_noise is None else asdict(self.fp8_noise),
        }

    def to_json(self, path: str | Path) -> Path:
        """Writes `to_dict()` to `path` in one move, so that no reader sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, indent=2)
                file.write("\n")
            # mkstemp makes files that only their owner can read.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(partial, 0o666 & ~umask)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        return path

    def table(self) -> Table:
        """One row an operation."""
        table = Table(title=self._title(), title_justify="left")
        table.add_column("operation", no_wrap=True)
        for column in ("asked", "found", "fused", "called"):
            table.add_column(column, justify="right")
        table.add_column("how", no_wrap=True)
        table.add_column("what runs as stock, and why", overflow="fold")
        for name, one in self.operations().items():
            reasons = [str(reason) for reason in one.fallbacks]
            reasons += [f"{reason}: {reason.calls} calls" for reason in one.runtime_fallbacks]
            levels = "+".join(sorted(one.levels)) if len(one.levels) > 1 else "".join(one.levels)
            table.add_row(
                PREFIX + name,
                "yes" if one.asked else "no",
                str(one.found) if one.asked else "",
                str(one.fused) if one.asked else "",
                (str(one.called) if self.steps or one.called else "not yet") if one.asked else "",
                levels,
                "\n".join(reasons),
            )
        return table

    def text(self, width: int = 120) -> str:
        """The table and the notes as plain text."""
        console = Console(width=width, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        ways = [f"{way}: {calls} calls" for way, calls in self.masks().items()]
        notes = [*self.notes, *([f"attention masks: {', '.join(ways)}"] if ways else [])]
        if self.proofs:
            notes.append(
                f"verification: {self.proofs} distinct blocks compared with stock in "
                f"{self.proving_s:.1f} s"
            )
        return capture.get() + "".join(f"note: {note}\n" for note in notes)

    def check_fused(self) -> None:
        """Does nothing without `fused_strict`.

        Raises:
            FuseError: Some module of an operation that was asked for could not be fused.
        """
        if self.config.fused_strict:
            _raise_if(
                f"{PREFIX}{name}: {reason}"
                for name, one in self.operations().items()
                for reason in one.fallbacks
                if one.asked
            )

    def check_called(self) -> None:
        """Says which fused operations never ran; with `fused_strict` that is an error.

        Raises:
            FuseError: `fused_strict` is set, and no module of a fused operation ran in fused form.
        """
        idle = [
            f"{PREFIX}{name}: {_why_idle(one)}"
            for name, one in self.operations().items()
            # Graphs are recorded some steps later than this is asked; a loop that never walks over
            # the modules misses nothing.
            if one.fused and not one.called and PREFIX + name not in (GRAPHS, TRAVERSAL)
        ]
        if self.config.fused_strict:
            _raise_if(idle)
        for line in idle:
            instead = "all computes in bf16" if line.startswith(FP8) else "it runs as stock"
            log.warning(f"{line}; {instead}")

    def _title(self) -> str:
        after = f"after step {self.steps}" if self.steps else "before the first step"
        where = gpu_name() or "CPU: the torch reference runs, the Triton kernels need a GPU"
        return f"lorafuse {versions()['lorafuse']}, {after}, on {where}"


def _summarise(asked: bool, records: Sequence[Record]) -> OperationReport:
    fused = [record for record in records if record.fused]
    return OperationReport(
        asked=asked,
        found=sum(bool(record.module) for record in records),
        fused=len(fused),
        called=sum(record.calls > 0 for record in fused),
        calls=sum(record.calls for record in fused),
        levels=dict(Counter(record.level for record in fused)),
        fallbacks=_group(
            (record.reason, record.module, 0) for record in records if not record.fused
        ),
        runtime_fallbacks=_group(
            (reason, record.module, calls)
            for record in fused
            for reason, calls in record.stock_calls.items()
        ),
    )


def _group(entries: Any) -> list[Reason]:
    groups: dict[str, list[tuple[str, int]]] = {}
    for reason, module, calls in entries:
        groups.setdefault(reason, []).append((module, calls))
    return [
        Reason(reason, len(members), members[0][0], sum(calls for _, calls in members))
        for reason, members in groups.items()
    ]


def _why_idle(one: OperationReport) -> str:
    if one.runtime_fallbacks:
        return f"every call fell back: {one.runtime_fallbacks[0]}"
    return f"fused in {one.fused} modules, but none of them was called"


def _raise_if(problems: Any) -> None:
    lines = list(problems)
    if lines:
        raise FuseError(
            "fused_strict is set, and not everything that was asked for can run fused:\n  "
            + "\n  ".join(lines)
            + "\nSwitch these flags off, or set `fused_strict: false` to train with them as stock"
            + (" (FP8: in bf16)." if any(line.startswith(FP8) for line in lines) else ".")
        )
