"""A step that runs out of memory is repeated, on TRL's real SFTTrainer, and nothing is lost."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lorafuse import LorafuseCallback
from lorafuse.patches import checkpointing
from lorafuse.patches.modes import OFF, OFFLOAD, SELECTIVE

from .test_trl import build, logs


class Fault:
    """Runs out of memory in chosen calls of one layer: in forward, or midway in backward."""

    def __init__(self, layer: Any, calls: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.seen, self.modes = calls, 0, []
        begin = layer.begin

        def faulty(h, shared):
            self.modes.append(None)
            kept = begin(h, shared)
            self.modes[-1] = layer.mode
            where = calls.get(self.seen)
            self.seen += 1
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if where == "backward":
                h.register_hook(self.fail)
            return kept

        monkeypatch.setattr(layer, "begin", faulty)

    @staticmethod
    def fail(grad: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")


def train(weights, config, tokenizer, folder, monkeypatch, faults=None, **flags: Any) -> Any:
    """Four optimiser steps of two micro-batches each, dropout on."""
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
    }
    trainer = build(model, tokenizer, folder, **options)
    for module in trainer.model.modules():
        if type(module).__name__ == "LoraLayer" or hasattr(module, "lora_dropout"):
            for name in list(module.lora_dropout):
                module.lora_dropout[name] = torch.nn.Dropout(0.1)
    callback = LorafuseCallback(**flags)
    trainer.add_callback(callback)
    fault = None
    if faults is not None:
        # The layers exist once training has begun.
        began = callback.on_train_begin

        def on_train_begin(*args: Any, **kwargs: Any) -> None:
            nonlocal fault
            began(*args, **kwargs)
            # The second layer: backward has been through the layers above it by then.
            fault = Fault(callback.report.checkpointing.layers[1], faults, monkeypatch)

        monkeypatch.setattr(callback, "on_train_begin", on_train_begin)
    trainer.train()
    state = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer, callback, state, fault


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("call", [0, 1, 3], ids=["first", "accumulating", "later"])
def test_the_run_goes_on_as_if_nothing_had_happened(
    where, call, bare_llama, tokenizer, tmp_path, monkeypatch, capfd
) -> None:
    weights = {name: value.clone() for name, value in bare_llama.state_dict().items()}
    same = weights, bare_llama.config, tokenizer
    plain, _, expected, _ = train(*same, tmp_path / "plain", monkeypatch)
    faulty, callback, state, fault = train(*same, tmp_path / "faulty", monkeypatch, {call: where})
    assert fault.seen == 4 * 2 + 1  # one micro-batch twice
    assert fault.modes[call] == OFF
    assert fault.modes[call + 1 :] == [SELECTIVE] * (8 - call)
    for a, b in zip(logs(plain), logs(faulty), strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert "fused_checkpointing: selective" in capfd.readouterr().err
    assert callback.report.operations()["checkpointing"].levels == {SELECTIVE: 2}
    assert "training_step" not in vars(faulty)


def test_mode_after_mode_and_then_the_error(
    bare_llama, tokenizer, tmp_path, monkeypatch, capfd
) -> None:
    weights = {name: value.clone() for name, value in bare_llama.state_dict().items()}
    same = weights, bare_llama.config, tokenizer
    faults = {0: "backward", 1: "backward", 2: "forward"}
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        train(*same, tmp_path, monkeypatch, faults)
    said = capfd.readouterr().err
    assert said.count("is run again") == 2
    assert f"fused_checkpointing: {OFFLOAD}" in said


def test_only_auto_repeats(bare_llama, tokenizer, tmp_path, monkeypatch) -> None:
    weights = {name: value.clone() for name, value in bare_llama.state_dict().items()}
    same = weights, bare_llama.config, tokenizer
    with pytest.raises(torch.OutOfMemoryError):
        train(*same, tmp_path, monkeypatch, {0: "backward"}, fused_checkpointing="selective")


def test_the_trainers_own_checkpointing_is_replaced_and_the_report_says_so(
    bare_llama, tokenizer, tmp_path
) -> None:
    trainer = build(bare_llama, tokenizer, tmp_path, gradient_checkpointing=True)
    callback = LorafuseCallback(fused_checkpointing="selective")
    trainer.add_callback(callback)
    trainer.train()
    layers = [one.module for one in callback.report.checkpointing.layers]
    assert not any(layer.gradient_checkpointing for layer in layers)
    row = callback.report.operations()[checkpointing.OPERATION]
    assert row.fused == row.called == len(layers) and row.levels == {SELECTIVE: len(layers)}
    assert any("gradient checkpointing of the trainer" in note for note in callback.report.notes)
    callback.report.unfuse()
    assert all(layer.gradient_checkpointing for layer in layers)
