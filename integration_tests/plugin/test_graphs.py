"""`fused_graphs`: never on by itself, and the report says what was replayed, and why not."""

from typing import Any

import pytest
import torch
from graph_emulation import EmulatedRecorder

from lorafuse import fuse
from lorafuse.patches import apply as apply_module
from lorafuse.patches import layer_graphs
from lorafuse.patches.layer_graphs import WARM
from lorafuse.plugin.errors import FuseError

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_graphs, "CudaRecorder", EmulatedRecorder)
    monkeypatch.setattr(apply_module, "why_no_graphs", lambda device: None)


def step(model: Any) -> float:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_the_report_says_why_and_strict_is_an_error(llama) -> None:
    report = fuse(llama, fused_graphs=True)
    (reason,) = report.operations()["graphs"].fallbacks
    assert reason.reason == "CUDA graphs need an NVIDIA GPU; the model is on the cpu"
    report.unfuse()
    with pytest.raises(FuseError, match="fused_graphs: CUDA graphs need"):
        fuse(llama, fused_graphs=True, fused_strict=True)


def test_the_report_counts_replays_and_says_what_ran_as_ever(llama, emulated) -> None:
    report = fuse(llama, fused_checkpointing="off", fused_graphs=True, fused_strict=True)
    losses = [step(llama)]
    report.steps = 1
    report.check_called()  # strict: graphs are recorded later
    losses += [step(llama) for _ in range(WARM + 1)]
    one = report.operations()["graphs"]
    assert (one.fused, one.called, one.calls) == (2, 2, 2 * 2)
    assert str(one.runtime_fallbacks[0]).startswith("a shape is recorded")
    assert len(set(losses)) == 1
    row = next(line for line in report.text().splitlines() if "fused_graphs" in line)
    assert "layer" in row
