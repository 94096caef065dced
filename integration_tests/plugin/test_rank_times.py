"""The script that compares all ranks with stock on a GPU, as far as a CPU can run it."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TINY = (
    "rank_times.py", "--model", "tiny", "--device", "cpu", "--quants", "none", "--ranks", "4", "8",
    "--shapes", "1x16", "--steps", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("rank_times")


def test_all_pairs_and_the_status(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pairs.json"
    monkeypatch.setattr(sys, "argv", [*TINY, "--json", str(file)])
    status = script.main()
    pairs = [script.Pair(**one) for one in json.loads(file.read_text("utf-8"))["pairs"]]
    assert [(one.rank, one.mode) for one in pairs] == [
        (4, "off"), (4, "selective"), (8, "off"), (8, "selective"),
    ]  # fmt: skip
    assert status == int(any(one.ratio < 1 for one in pairs))
