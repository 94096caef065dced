"""A fused run: metrics in the trainer's own logs, and the report after step 1 and at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorafuse import FuseConfig, LorafuseCallback
from lorafuse.plugin import throughput
from lorafuse.plugin.errors import FuseError
from lorafuse.plugin.run import PEAK_MEMORY_GB, TOKENS_PER_SECOND
from lorafuse.plugin.throughput import Throughput

METRICS = {TOKENS_PER_SECOND, PEAK_MEMORY_GB}
ROWS = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 16


class Recorder(TrainerCallback):
    """What a reporting callback (W&B, MLflow, TensorBoard) is given, at the time when it is."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


def build(model: Any, folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        | options,
    )
    return Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:4])


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "lorafuse_report.json").read_text("utf-8"))
    return loaded


def test_metrics_reach_callbacks_that_were_added_before(llama, tmp_path) -> None:
    trainer, recorder = build(llama, tmp_path), Recorder()
    trainer.add_callback(recorder)
    trainer.add_callback(LorafuseCallback())
    trainer.train()
    steps = [logs for logs in recorder.logs if "loss" in logs]
    assert len(steps) == 4
    for logs in steps:
        assert logs.keys() >= METRICS
        assert logs[TOKENS_PER_SECOND] > 0 and logs[PEAK_MEMORY_GB] > 0
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry[TOKENS_PER_SECOND] for entry in history] == [
        logs[TOKENS_PER_SECOND] for logs in steps
    ]
    # Ours are of training alone.
    others = [logs for logs in recorder.logs if "loss" not in logs]
    assert others and not any(METRICS & logs.keys() for logs in others)


def test_the_peak_is_the_runs_where_the_trainer_counts_anew_when_it_logs(
    llama, tmp_path, monkeypatch
) -> None:
    """As Axolotl does: it logs the peak itself, and resets it ahead of the callbacks."""
    gb = {"peak": 1.0}
    monkeypatch.setattr(throughput, "_peak_memory_gb", lambda: gb["peak"])
    needed = iter((7.0, 5.0, 8.0, 6.0))

    class Resetting(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            gb["peak"] = max(gb["peak"], next(needed))
            return loss

        def log(self, *args: Any, **kwargs: Any) -> None:
            gb["peak"] = 1.0
            super().log(*args, **kwargs)

    built = build(llama, tmp_path)
    trainer = Resetting(model=built.model, args=built.args, train_dataset=ROWS)
    trainer.add_callback(LorafuseCallback())
    trainer.train()
    peaks = [one[PEAK_MEMORY_GB] for one in trainer.state.log_history if "loss" in one]
    assert peaks == [7.0, 7.0, 8.0, 8.0]


def test_tokens_are_those_that_are_not_padding(llama) -> None:
    counter = Throughput()
    counter.attach(llama)
    ids = torch.full((2, 5), 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    counter.start_stretch()
    llama(input_ids=ids, attention_mask=mask)
    assert int(counter._tokens) == 8
    llama(input_ids=ids)
    llama(ids)
    assert int(counter._tokens) == 28
    with torch.no_grad():
        llama(input_ids=ids)
    llama.eval()
    llama(input_ids=ids)
    assert int(counter._tokens) == 28
    assert (counter.end_stretch() or 0) > 0
    assert counter.end_stretch() is None
    llama.train()
    counter.start_stretch()
    counter.drop_stretch()
    assert counter.end_stretch() is None
    counter.detach()
    counter.start_stretch()
    llama(input_ids=ids)
    assert counter.end_stretch() is None


def test_a_stretch_that_an_evaluation_cuts_off_is_dropped(llama, tmp_path) -> None:
    trainer = build(llama, tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=1)
    callback, counted = LorafuseCallback(), []

    class Count(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                counted.append(int(callback._throughput._tokens))

    trainer.add_callback(callback)
    trainer.add_callback(Count())
    trainer.train()
    # Steps 1 and 3 end in an evaluation, so the logs after steps 2 and 4 cover one step each: two
    # rows of four tokens.
    assert counted == [8, 8]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2 and all(entry[TOKENS_PER_SECOND] > 0 for entry in history)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 4 and not any(METRICS & entry.keys() for entry in evaluated)


class ReadReport(TrainerCallback):
    """The report's file, as it is when training begins and after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(report(self.folder))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(report(self.folder))


def test_the_report_is_written_before_after_step_one_and_at_the_end(llama, tmp_path, capfd) -> None:
    trainer, reader = build(llama, tmp_path), ReadReport(tmp_path)
    trainer.add_callback(LorafuseCallback(fused_lora_mlp=True))
    trainer.add_callback(reader)
    trainer.train()
    calls = [said["operations"]["lora_mlp"]["calls"] for said in reader.seen]
    assert calls == [0, 2, 2, 2, 2]
    assert [said["steps"] for said in reader.seen] == [0, 1, 1, 1, 1]
    last = report(tmp_path)
    assert (last["steps"], last["operations"]["lora_mlp"]["calls"]) == (4, 8)
    said = capfd.readouterr().err
    assert said.index("what was fused") < said.index("what was called")
    assert "before the first step" in said and "after step 1" in said


def test_strict_stops_after_step_one_where_nothing_was_called(llama, tmp_path) -> None:
    trainer = build(llama, tmp_path)
    callback = LorafuseCallback(fused_lora_mlp=True, fused_strict=True)
    trainer.add_callback(callback)
    for layer in llama.base_model.model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(FuseError, match="fused_lora_mlp"):
        trainer.train()
    assert trainer.state.global_step <= 1


def test_strict_stops_before_the_first_step_where_something_is_not_fused(gpt2, tmp_path) -> None:
    trainer = build(gpt2, tmp_path)
    trainer.add_callback(LorafuseCallback(fused_strict=True))
    with pytest.raises(FuseError, match="no gated MLP"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_same_trainer_may_train_again(llama, tmp_path) -> None:
    trainer = build(llama, tmp_path, max_steps=1)
    callback = LorafuseCallback()
    trainer.add_callback(callback)
    trainer.train()
    first = callback.report
    trainer.train()
    assert callback.report is not first and callback.report is not None
    assert callback.report.operations()["lora_mlp"].called == 2
    assert not llama._forward_pre_hooks
    callback.report.unfuse()
    assert not any("forward" in m.__dict__ for m in llama.modules() if m is not llama)


def test_the_8_bit_optimiser_is_fused_and_trains_the_same(llama, tmp_path) -> None:
    losses = []
    start = {name: p.detach().clone() for name, p in llama.named_parameters()}
    for flag in (False, True):
        llama.load_state_dict(start, strict=False)
        torch.manual_seed(0)
        trainer = build(llama, tmp_path, optim="adamw_bnb_8bit", learning_rate=1e-2)
        callback = LorafuseCallback(fused_lora_mlp=True, fused_optimizer=flag)
        trainer.add_callback(callback)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        row = report(tmp_path)["operations"].get("optimizer")
        assert (row is not None) is flag
        callback.report.unfuse()
    assert row is not None and row["fused"] == 1 and row["calls"] == 4
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]


def test_an_optimiser_asked_for_by_name_that_is_none_of_bitsandbytes(llama, tmp_path) -> None:
    trainer = build(llama, tmp_path, optim="adamw_torch")
    trainer.add_callback(LorafuseCallback(fused_optimizer=True, fused_strict=True))
    with pytest.raises(FuseError, match="AdamW is not one of bitsandbytes"):
        trainer.train()


def test_an_optimiser_that_only_fused_true_asks_for_stays_as_it_is(llama, tmp_path) -> None:
    trainer = build(llama, tmp_path, optim="adamw_torch", max_steps=1)
    config = FuseConfig.from_yaml({"fused": True, "fused_strict": True})
    trainer.add_callback(LorafuseCallback(config))
    trainer.train()
    assert trainer.state.global_step == 1
    assert "optimizer" not in report(tmp_path)["operations"]
