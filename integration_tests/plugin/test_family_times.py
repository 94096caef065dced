"""The script that times the named families on a GPU, as far as a CPU can run it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "integration_tests" / "gpu" / "family_times.py"
MEASURED = SCRIPT.parent / "measured" / "family_times.json"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_times", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["GLM-4", "Qwen3 30B"])
def test_tiny_models_run(script: ModuleType, tmp_path: Path, name: str) -> None:
    file = tmp_path / "times.json"
    script.main(["--tiny", "--device", "cpu", "--only", name, "--json", str(file)])
    (found,) = json.loads(file.read_text("utf-8"))["families"].values()
    same = found["same_step"]
    assert abs(same["loss_difference"]) < 1e-3 and abs(same["norm_ratio"] - 1) < 1e-2
    assert found["operations"]["lora_qkv"] == "2/2"
    for setting in ("stock", "fused", "stock, checkpointing", "fused, selective"):
        assert found[setting]["step_ms"] > 0


def test_the_readme_says_what_was_measured(script: ModuleType) -> None:
    content = json.loads(MEASURED.read_text("utf-8"))
    assert "H100" in content["gpu"] and set(content["families"]) == set(script.FAMILIES)
    assert f"-->\n{script.page([MEASURED])}\n<!-- end" in (ROOT / "README.md").read_text("utf-8")
