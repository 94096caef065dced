"""What `lorafuse bench` has measured: medians, spreads, differences to stock.

Tokens a second are those of the median step; the spread is that of single steps, and beside it are
the rounds' own medians. Peaks are the highest of all rounds. Losses and gradient norms of each step
are compared with those of stock's first round; what stock's later rounds differ by from its first
is the noise of stock itself. GB are 1e9 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, Literal

from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.environment import versions

REFERENCE = "stock"

Status = Literal["ok", "out of memory", "unsupported", "failed"]


@dataclass
class SystemResult:
    """All rounds of one system.

    Attributes:
        name: The system.
        rounds: What the worker measured in each round that ended well.
        status: "ok", or how its last round ended.
        error: Why it is not "ok".
        stage: What it was doing then.
        machine: The GPU's name, and how much of its memory was free before, `free_GB` of
            `total_GB`; empty on a CPU.
    """

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    status: Status = "ok"
    error: str = ""
    stage: str = ""
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def step_ms(self) -> list[float]:
        return [one for one_round in self.rounds for one in one_round["step_ms"]]

    def highest(self, key: str) -> float | None:
        """Of all rounds; None where nothing was measured, as memory on a CPU."""
        values = [one_round[key] for one_round in self.rounds if one_round.get(key) is not None]
        return max(values) if values else None

    def summary(self, job: Job, stock: "SystemResult | None") -> dict[str, Any]:
        """The numbers of the table; only the status where no round ended well."""
        found: dict[str, Any] = {"status": self.status, "error": self.error, "stage": self.stage}
        if self.status != "ok":
            return found
        rate = [1e3 * job.batch * job.tokens / one for one in self.step_ms]
        per_round = [median(one_round["step_ms"]) for one_round in self.rounds]
        found |= {
            "tokens_per_s": 1e3 * job.batch * job.tokens / median(self.step_ms),
            "tokens_per_s_lowest": min(rate),
            "tokens_per_s_highest": max(rate),
            "tokens_per_s_of_rounds": [1e3 * job.batch * job.tokens / one for one in per_round],
            "step_ms": median(self.step_ms),
            "first_step_s": median(r["setup_s"] + r["first_step_s"] for r in self.rounds),
            "peak_allocated_GB": self.highest("peak_allocated_GB"),
            "peak_reserved_GB": self.highest("peak_reserved_GB"),
            "first_step_peak_allocated_GB": self.highest("first_step_peak_allocated_GB"),
            "last_loss": self.rounds[0]["losses"][-1],
        }
        if stock is not None and stock.status == "ok":
            ours, its = self.rounds[0], stock.rounds[0]
            found["ratio"] = median(stock.step_ms) / found["step_ms"]
            found["first_loss_difference"] = ours["losses"][0] - its["losses"][0]
            found["first_gradient_norm_ratio"] = (
                ours["gradient_norms"][0] / its["gradient_norms"][0]
            )
            found["largest_loss_difference"] = self._furthest("losses", stock, relative=False)
            found["largest_relative_gradient_norm_difference"] = self._furthest(
                "gradient_norms", stock, relative=True
            )
        return found

    def _furthest(self, key: str, stock: "SystemResult", relative: bool) -> float:
        """The largest difference to stock's first round of any step of any round."""
        largest: float = max(
            abs(one - other) / (abs(other) if relative else 1.0)
            for one_round in self.rounds
            for one, other in zip(one_round[key], stock.rounds[0][key], strict=True)
        )
        return largest


@dataclass
class Results:
    """What `run` found out.

    Attributes:
        job: What each system did; its `system` means nothing here.
        rounds: How many were asked for.
        systems: In the order that they were asked for.
        skipped: Systems that cannot run here -> why.
        parameters: Of the model, without adapters.
        allocator: The environment variable that torch's allocator was set with, NAME=VALUE.
        date: When the run ended, in UTC.
    """

    job: Job
    rounds: int
    systems: dict[str, SystemResult]
    skipped: dict[str, str]
    parameters: int
    allocator: str
    date: datetime

    @property
    def gpu(self) -> str | None:
        names = [one.machine.get("gpu") for one in self.systems.values()]
        return next((name for name in names if name), None)

    @property
    def stock(self) -> SystemResult | None:
        return self.systems.get(REFERENCE)

    @property
    def complete(self) -> bool:
        """Nothing failed, and something ran. Out of memory is an answer as good as a number."""
        ended = [one.status for one in self.systems.values()]
        return "failed" not in ended and "ok" in ended

    def summaries(self) -> dict[str, dict[str, Any]]:
        return {name: one.summary(self.job, self.stock) for name, one in self.systems.items()}

    def command(self) -> str:
        return self.job.command(list(self.systems), self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types. GB are 1e9 bytes."""
        job = {k: v for k, v in vars(self.job).items() if k != "system"}
        return {
            "date": self.date.isoformat(timespec="seconds"),
            "command": self.command(),
            "arguments": job | {"rounds": self.rounds, "systems": list(self.systems)},
            "gpu": self.gpu,
            "versions": all_versions(),
            "allocator": self.allocator,
            "parameters": self.parameters,
            "systems": {
                name: summary | {"rounds": self.systems[name].rounds}
                for name, summary in self.summaries().items()
            },
            "skipped": self.skipped,
        }


def to_dict(models: Sequence[Results]) -> dict[str, Any]:
    """What `--json` writes: one model's results, or of several a list, under `models`."""
    if len(models) == 1:
        return models[0].to_dict()
    return {"models": [one.to_dict() for one in models]}


def all_versions() -> dict[str, str | None]:
    """Of what is in any of the systems."""
    try:
        liger = version("liger-kernel")
    except PackageNotFoundError:
        liger = None
    return versions() | {"liger-kernel": liger}
