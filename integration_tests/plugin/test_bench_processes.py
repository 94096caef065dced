"""The processes of `lorafuse bench`: started ahead, one job each, and none left behind."""

import time
from dataclasses import replace

import pytest

from lorafuse.plugin import bench_processes
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_processes import Worker, Workers, allocator_setting, run_worker
from lorafuse.plugin.bench_results import SystemResult

JOB = Job("stock", "tiny", None, "none", 4, 2, 16, 1, False, 1, None, "cpu")


def test_one_works_while_the_next_waits() -> None:
    started: list[Worker] = []
    with Workers(2, ahead=5) as workers:
        for system in ("stock", "lorafuse"):
            result = SystemResult(system)
            run_worker(workers, replace(JOB, system=system), result)
            assert result.status == "ok" and len(result.rounds) == 1, result.error
            assert ("report" in result.rounds[0]) == (system == "lorafuse")
            started += workers._waiting
            # The second began with the first's work; there is no job for a third.
            assert len(workers._waiting) == (1 if system == "stock" else 0)
        assert started[0].process.returncode == 0
        with pytest.raises(IndexError):
            workers.take()


def test_who_waits_in_vain_is_stopped() -> None:
    with Workers(3, ahead=2) as workers:
        taken = workers.take()
        workers.start_ahead()
        waiting = [one.process for one in workers._waiting]
        assert len(waiting) == 2 and all(one.poll() is None for one in (taken.process, *waiting))
        taken.stop()
    assert all(one.returncode is not None for one in (taken.process, *waiting))


def test_a_worker_without_a_job_ends_by_itself() -> None:
    """As when the command itself is killed."""
    worker = Worker()
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.process.wait(timeout=120) == 0
    worker.stop()


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_processes, "worker_environment", lambda: {"PYTHONHOME": "/nowhere", "PATH": "/no"}
    )
    result = SystemResult("stock")
    with Workers(1, 0) as workers:
        run_worker(workers, JOB, result)
    assert result.status == "failed" and "its process ended with code 1" in result.error


def test_a_worker_that_died_while_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    result = SystemResult("stock")
    with Workers(1, 1) as workers:
        workers.start_ahead()
        (worker,) = workers._waiting
        worker.process.kill()
        time.sleep(0.1)
        run_worker(workers, JOB, result)
    assert result.status == "failed" and "its process ended with code -9" in result.error


def test_one_allocator_setting_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert allocator_setting().endswith("ALLOC_CONF=expandable_segments:True")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert allocator_setting() == "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64"
    assert "PYTORCH_ALLOC_CONF" not in bench_processes.worker_environment()
