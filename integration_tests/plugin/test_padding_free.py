"""`fused_padding_free`: never on by itself; TRL's padded batches, and what the report says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lorafuse import FuseConfig, LorafuseCallback, fuse
from lorafuse.plugin.errors import FuseConfigError, FuseError

from .test_trl import SAME, build, logs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fused_attention": "sdpa"}, "no effect with `fused_attention: sdpa`"),
        ({"fused_attention": "off"}, "no effect with `fused_attention: off`"),
        ({"fused_graphs": True}, "`fused_graphs: true` is for batches that keep one"),
    ],
)
def test_what_it_does_not_go_with(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(FuseConfigError, match=message):
        FuseConfig(fused_padding_free=True, **flags)


def test_trls_padded_batches(bare_llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in bare_llama.state_dict().items()}
    stock = build(bare_llama, tokenizer, tmp_path / "stock")
    stock.train()
    again = LlamaForCausalLM(bare_llama.config)
    again.load_state_dict(weights)
    trainer = build(again, tokenizer, tmp_path / "fused")
    callback = LorafuseCallback(fused_padding_free=True, fused_strict=True)
    trainer.add_callback(callback)
    trainer.train()
    for ours, theirs in zip(logs(trainer), logs(stock), strict=True):
        for name in SAME:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert callback.report is not None
    one = callback.report.operations()["padding_free"]
    assert one.found == one.fused == one.called == 1
    padded = sum(reason.calls for reason in one.runtime_fallbacks)
    assert one.calls >= 1 and one.calls + padded == 4
    assert "fused_padding_free" in callback.report.text()


def test_in_vain_is_an_error_where_that_is_asked_for(llama: Any) -> None:
    report = fuse(llama, fused_padding_free=True, fused_strict=True)
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    llama(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    report.steps = 1
    with pytest.raises(FuseError, match=r"fused_padding_free: every call fell back"):
        report.check_called()
