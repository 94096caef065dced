"""`fused_folded_weights`: never on by itself; the report says which weights moved, and why not."""

from typing import Any

import pytest
import torch

from lorafuse import FuseConfig, fuse
from lorafuse.plugin.errors import FuseConfigError, FuseError

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))


def step(model: Any) -> float:
    model.zero_grad()
    ids = IDS.to(model.device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def test_it_is_for_base_weights() -> None:
    with pytest.raises(FuseConfigError, match="has no effect without fused_lora_mlp"):
        FuseConfig(fused_folded_weights=True, fused_cross_entropy=True)


def test_the_report_says_what_moved(llama: Any) -> None:
    stock = step(llama)
    report = fuse(llama, fused_folded_weights=True, fused_strict=True)
    assert any("first training step" in note for note in report.notes)
    losses = [step(llama), step(llama)]
    report.steps = 2
    report.check_called()
    one = report.operations()["folded_weights"]
    assert one.found == one.fused == one.called > 0
    assert one.calls == 2 * one.fused and not one.runtime_fallbacks
    assert losses == pytest.approx([stock, stock], rel=1e-5)
    assert "fused_folded_weights" in report.text()
    report.unfuse()
    assert all(p.is_contiguous() for p in llama.parameters())


def test_weights_of_another_dtype_say_so(llama: Any) -> None:
    report = fuse(llama, fused_folded_weights=True)
    with torch.autocast(llama.device.type, torch.bfloat16):
        step(llama)
    report.steps = 1
    one = report.operations()["folded_weights"]
    (reason,) = one.runtime_fallbacks
    assert reason.reason == "its weight is torch.float32, and torch.bfloat16 is computed in"
    assert one.fused and not one.called
    assert all(p.is_contiguous() for p in llama.parameters())


def test_in_vain_is_an_error_where_that_is_asked_for(llama: Any) -> None:
    report = fuse(llama, fused_folded_weights=True, fused_strict=True)
    with torch.autocast(llama.device.type, torch.bfloat16):
        step(llama)
    report.steps = 1
    with pytest.raises(FuseError, match=r"fused_folded_weights: every call fell back"):
        report.check_called()
