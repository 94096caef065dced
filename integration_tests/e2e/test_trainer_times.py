"""The script that times whole runs of trainers on a GPU, as far as a CPU can run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "trainer_times.py"
TINY = (
    "--device", "cpu", "--model", "smollm2-135m", "--layers", "2", "--tokens", "32", "--steps", "4",
)  # fmt: skip


def test_two_runs_of_trl(assets: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    file = tmp_path / "runs.json"
    command = [sys.executable, str(SCRIPT), *TINY, "--tokenizer", str(assets / "smollm2-135m")]
    command += ["--trainers", "trl", "--systems", "stock", "lorafuse off", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    stock, fused = json.loads(file.read_text("utf-8"))["runs"]
    assert [one["system"] for one in (stock, fused)] == ["stock", "lorafuse off"]
    assert not stock["called"] and fused["called"]["lora_mlp"] == 2
    assert len(stock["losses"]) == 4 and len(fused["step_ms"]) == 1
    assert fused["losses"] == pytest.approx(stock["losses"], abs=1e-5)
    assert fused["gradient_norms"] == pytest.approx(stock["gradient_norms"], rel=1e-5)
