"""The processes of `lorafuse bench`, one for each system and round.

A process imports torch, transformers and bitsandbytes for some seconds before it can begin, as long
as a short job takes. So a few start ahead, import, and wait for their job without having touched
the GPU. Each does one job and ends: neither patches nor peaks of one system reach another.

The processes get one allocator setting, `expandable_segments:True`, unless the environment has one
already: Axolotl sets it for its own runs, and it keeps fragmentation from deciding who runs out of
memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Self

import torch

from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_results import SystemResult

# That wait while another one works. On a CPU their imports would slow down what is timed.
AHEAD = {"cuda": 2, "cpu": 0}
STARTING = "starting"


class Worker:
    """One process of `bench_worker`, which imports, and then waits for its job."""

    def __init__(self) -> None:
        # -P: what lies in the current folder is not imported, as it is not by the command itself.
        command = [sys.executable, "-P", "-m", "lorafuse.plugin.bench_worker"]
        self._noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            env=worker_environment(),
            encoding="utf-8",
        )

    def events(self, job: Job) -> Iterator[dict[str, Any]]:
        """Gives it the job, and yields what it says until it ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it died first; `last_words` says how
            self.process.stdin.write(job.to_json())
            self.process.stdin.close()
        for line in self.process.stdout:
            yield json.loads(line)
        self.process.wait()

    def last_words(self) -> str:
        """How it ended, and the last line that it wrote to stderr."""
        self._noise.seek(0)
        lines = [line.strip() for line in self._noise if line.strip()]
        said = lines[-1] if lines else "it said nothing"
        return f"its process ended with code {self.process.returncode}: {said}"

    def stop(self) -> None:
        """Ends it wherever it is. After it has ended, only closes its files."""
        self.process.kill()
        with suppress(BrokenPipeError), self.process:  # waits for it, and closes the pipes
            pass
        self._noise.close()


class Workers:
    """Workers that are started ahead, as a context that stops those without a job.

    Args:
        jobs: Started at most, in all.
        ahead: That wait while one works.
    """

    def __init__(self, jobs: int, ahead: int) -> None:
        self._to_start = jobs
        self._ahead = ahead
        self._waiting: deque[Worker] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._waiting:
            self._waiting.popleft().stop()

    def take(self) -> Worker:
        """The one that has waited longest, or a new one."""
        self._start(1)
        return self._waiting.popleft()

    def start_ahead(self) -> None:
        """While one works: others start, as many as are to wait."""
        self._start(self._ahead)

    def _start(self, waiting: int) -> None:
        while len(self._waiting) < waiting and self._to_start > 0:
            self._waiting.append(Worker())
            self._to_start -= 1


def run_worker(
    workers: Workers,
    job: Job,
    result: SystemResult,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """One process of one system; what it measured, or how it ended, is entered into `result`."""
    progress(STARTING)
    worker = workers.take()
    ended = False
    try:
        for event in worker.events(job):
            kind = event.pop("event")
            if kind == "machine":
                result.machine = event
            elif kind == "stage":
                workers.start_ahead()
                result.stage = event["stage"]
                progress(result.stage)
            elif kind == "done":
                ended = True
                result.rounds.append(event)
            else:
                ended = True
                result.status, result.error = kind, event["error"]
        if not ended:
            result.status, result.error = "failed", worker.last_words()
    finally:
        worker.stop()


def worker_environment() -> dict[str, str]:
    """Of every system alike: nothing is downloaded or reported, one allocator setting."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    name, value = allocator_setting().split("=", 1)
    return os.environ | fixed | {name: value}


def allocator_setting() -> str:
    """NAME=VALUE of the environment variable that torch reads."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    newer = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
    name = "PYTORCH_ALLOC_CONF" if newer else "PYTORCH_CUDA_ALLOC_CONF"
    return f"{name}=expandable_segments:True"
