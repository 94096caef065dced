"""Two processes on the CPU: DDP and FSDP2 around a tiny model, with the scripts for two GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integration_tests" / "gpu"
MODES = ("off", "selective", "off | offload")


def torchrun(script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Starts a script on two ranks; a rank that waits in vain is an error after 100 seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(FOLDER / script), "--device", "cpu", *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100,
    )  # fmt: skip


def compare(file: Path, cases: list[str], *words: str) -> tuple[int, dict[str, Any]]:
    """`two_gpus.py`: its exit status and what it has written."""
    modes = ["--modes", *MODES, "--steps", "3", "--json", str(file)]
    done = torchrun("two_gpus.py", "--cases", *cases, *modes, *words)
    assert file.exists(), done.stdout[-4000:]
    return done.returncode, json.loads(file.read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        [
            "DDP, NF4",
            "DDP, bf16, accumulating",
            "DDP, bf16, looks for unused parameters",
            "DDP, bf16, one rank falls back",
        ],
        [
            "FSDP2, NF4",
            "FSDP2, bf16 adapters, accumulating",
            "FSDP2, bf16, one rank falls back",
            "FSDP2, fused too late",
            "FSDP2, each LoRA matrix apart",
        ],
    ],
    ids=["DDP", "FSDP2"],
)
def test_every_step_is_stocks(cases, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    status, found = compare(tmp_path / "found.json", cases)
    assert not found["problems"] and status == 0
    assert list(found["cases"]) == cases
    for case in found["cases"].values():
        assert list(case["modes"]) == list(MODES)
        for run in case["modes"].values():
            assert len(run["losses"]) == 3 and len(run["reports"]) == 2


def test_what_is_wrong_on_one_rank_is_found(tmp_path) -> None:
    cases = ["DDP, bf16, accumulating", "FSDP2, bf16"]
    status, found = compare(tmp_path / "found.json", cases, "--spoil")
    assert status != 0
    for case in found["cases"].values():
        for mode in MODES:
            of_mode = [one for one in case["problems"] if one.startswith(f"{mode}: ")]
            assert any("first gradient departs" in one for one in of_mode), of_mode
    assert any("differ between the ranks" in one for one in found["problems"])


@pytest.mark.parametrize("wrapper", [(), ("--fsdp",)], ids=["DDP", "FSDP2"])
def test_the_trainers_curve_is_stocks(wrapper, tmp_path) -> None:
    file = tmp_path / "curves.json"
    done = torchrun("two_gpu_trainer.py", "--json", str(file), *wrapper)
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads(file.read_text("utf-8"))
    assert len(found["stock"]) == len(found["fused"]) == 4
    for stock, fused in zip(found["stock"], found["fused"], strict=True):
        assert fused == pytest.approx(stock, rel=1e-4)


def test_a_rank_that_runs_out_of_memory_ends_the_run() -> None:
    done = torchrun("two_gpu_trainer.py", "--out-of-memory")
    assert done.returncode != 0
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB" in done.stdout
    assert "is run again" not in done.stdout and "the run went on" not in done.stdout
