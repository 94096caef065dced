"""TRL's real SFTTrainer with each of its losses, stock and fused: the same losses, gradient norms,
token accuracy and entropy, however the batch is split into micro-batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from lorafuse import LorafuseCallback

LOSSES = ("nll", "chunked_nll", "dft")
BATCH = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Labels of each example: uneven, and none at all in the last two, which at accumulation 4 are a
# micro-batch of their own.
LABELLED = (14, 3, 9, 1, 20, 6, 0, 0)
# From 1.15 on, TRL asks the model for log-probabilities and computes each of its losses itself.
FUSED_HEAD = hasattr(trl_utils, "add_fused_lm_head")
NO_LABELS = "no labels were passed: the caller wants logits"


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(256)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
    )


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for labelled in LABELLED:
        ids = torch.randint(3, 256, (12 + labelled,), generator=generator).tolist()
        # TRL drops examples without a label. One on the first token is gone after the shift.
        labels = [ids[0]] * (not labelled) + [-100] * (12 - (not labelled)) + ids[12:]
        rows.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(rows)


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config)


class Run:
    """One training run, its logs, and how often the fused loss ran."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        data: Dataset,
        loss_type: str,
        flags: dict[str, bool] | None,
        accumulation: int = 1,
        lora: LoraConfig | None = None,
        steps: int = 2,
        compute_metrics: Any = None,
        **arguments: Any,
    ) -> None:
        config = SFTConfig(
            output_dir=str(folder),
            loss_type=loss_type,
            per_device_train_batch_size=BATCH // accumulation,
            per_device_eval_batch_size=3,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **{"bf16": False, "gradient_checkpointing": False} | arguments,
        )
        self.trainer = SFTTrainer(
            model=make_model(),
            args=config,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            peft_config=lora or LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS),
        )
        self.callback = None
        if flags is not None:
            self.callback = LorafuseCallback(**flags)
            self.trainer.add_callback(self.callback)
        self.trainer.train()
        self.logs = [log for log in self.trainer.state.log_history if "loss" in log]
        assert len(self.logs) == steps

    @property
    def report(self) -> Any:
        """What the report says about the loss."""
        assert self.callback is not None and self.callback.report is not None
        return self.callback.report.operations()["cross_entropy"]

    @property
    def stock_calls(self) -> dict[str, int]:
        return {reason.reason: reason.calls for reason in self.report.runtime_fallbacks}


ONLY_LOSS = {"fused_cross_entropy": True}
LOGGED = ("loss", "grad_norm", "mean_token_accuracy", "entropy")


def assert_same_logs(ours: list[dict[str, Any]], stock: list[dict[str, Any]], limit: float) -> None:
    for step, (mine, theirs) in enumerate(zip(ours, stock, strict=True)):
        for name in LOGGED:
            expected = pytest.approx(theirs[name], rel=limit, abs=limit)
            assert mine[name] == expected, (step, name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any, tokenizer: Any, data: Dataset) -> dict[Any, Run]:
    """Every loss at accumulation 1, 2 and 4, stock and fused."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        (loss, accumulation, fused): Run(
            folder, tokenizer, data, loss, ONLY_LOSS if fused else None, accumulation
        )
        for loss in LOSSES
        for accumulation in (1, 2, 4)
        for fused in (False, True)
    }


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_logs_equal_stocks(runs, loss, accumulation):
    fused, stock = (runs[loss, accumulation, which].logs for which in (True, False))
    assert_same_logs(fused, stock, 1e-4)
    assert stock[0]["loss"] != stock[1]["loss"]  # it learns, or little would be shown
    assert all(log["entropy"] > 1 and log["grad_norm"] > 0 for log in stock)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_record_says_what_ran(runs, loss, accumulation):
    run = runs[loss, accumulation, True]
    micro_batches = 2 * accumulation
    assert run.report.fused == 1
    if loss == "dft" and not FUSED_HEAD:
        # computes its loss itself, from logits that it asks for without labels
        assert run.report.calls == 0
        assert run.stock_calls == {NO_LABELS: micro_batches}
    else:
        assert run.report.calls == micro_batches
        assert run.stock_calls == {}


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_changes_neither_loss_nor_gradient_norm(runs, loss, fused):
    whole = runs[loss, 1, fused].logs
    for accumulation in (2, 4):
        for split, one in zip(runs[loss, accumulation, fused].logs, whole, strict=True):
            assert split["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert split["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_the_losses_agree_among_themselves(runs):
    assert_same_logs(runs["nll", 2, True].logs, runs["chunked_nll", 2, True].logs, 1e-4)
    assert runs["dft", 1, True].logs[0]["loss"] < 0.1 * runs["nll", 1, True].logs[0]["loss"]


@pytest.mark.parametrize("loss", ["nll", "chunked_nll"])
def test_with_everything_else_fused(runs, tmp_path, tokenizer, data, loss):
    run = Run(tmp_path, tokenizer, data, loss, {}, accumulation=4)
    assert_same_logs(run.logs, runs[loss, 4, False].logs, 1e-3)
    assert run.report.calls == 8 and not run.stock_calls
    operations = run.callback.report.operations()
    assert all(operations[name].called for name in ("lora_mlp", "lora_qkv", "rms_norm"))


@pytest.mark.parametrize("loss", ["nll", "chunked_nll"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
    ],
    ids=["bf16", "checkpointing"],
)
def test_other_settings(tmp_path, tokenizer, data, loss, arguments):
    logs = {}
    for flags in (None, ONLY_LOSS):
        run = Run(tmp_path, tokenizer, data, loss, flags, accumulation=2, **arguments)
        logs[flags is None] = run.logs
    assert run.report.calls == 4 and not run.stock_calls
    assert_same_logs(logs[False], logs[True], 1e-2 if "bf16" in arguments else 1e-4)


@pytest.mark.parametrize("loss", ["nll", "chunked_nll"])
def test_a_trained_head(tmp_path, tokenizer, data, loss):
    logs = {}
    for flags in (None, ONLY_LOSS):
        lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        logs[flags is None] = Run(tmp_path, tokenizer, data, loss, flags, lora=lora)
    assert_same_logs(logs[False].logs, logs[True].logs, 1e-4)
    weights = [dict(r.trainer.model.named_parameters()) for r in logs.values()]
    (name,) = [n for n in weights[0] if "modules_to_save" in n]
    torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)
    assert logs[False].report.calls == (0 if FUSED_HEAD else 2)
    if FUSED_HEAD:
        (reason,) = logs[False].stock_calls
        assert "the head is trained" in reason


@pytest.mark.skipif(FUSED_HEAD, reason="this TRL refuses an adapted head with any loss")
def test_an_adapted_head_with_nll(tmp_path, tokenizer, data):
    """TRL's chunked loss refuses that; nll serves it."""
    logs = {}
    for flags in (None, ONLY_LOSS):
        lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
        logs[flags is None] = Run(tmp_path, tokenizer, data, "nll", flags, lora=lora)
    assert_same_logs(logs[False].logs, logs[True].logs, 1e-4)
    assert logs[False].report.calls == 2 and not logs[False].stock_calls


# Evaluation


def metrics_of(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = prediction.label_ids[:, 1:]
    kept = labels != -100
    right = (np.argmax(logits[:, :-1], -1) == labels) & kept
    return {"right": float(right.sum()), "first": float(logits[0, 0, 0]), "words": logits.shape[-1]}


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_compute_metrics_and_predict_get_real_logits(tmp_path, tokenizer, data, loss):
    results = []
    for flags in (None, ONLY_LOSS):
        run = Run(tmp_path, tokenizer, data, loss, flags, compute_metrics=metrics_of)
        evaluated = run.trainer.evaluate()
        predicted = run.trainer.predict(data)
        logits = predicted.predictions
        results.append((evaluated, logits[0] if isinstance(logits, tuple) else logits))
    (stock, stock_logits), (fused, fused_logits) = results
    assert isinstance(fused_logits, np.ndarray) and fused_logits.shape == stock_logits.shape
    np.testing.assert_allclose(fused_logits, stock_logits, rtol=1e-3, atol=1e-4)
    assert stock["eval_words"] == 256
    for name in stock:
        if not name.endswith(("runtime", "per_second")):
            assert fused[name] == pytest.approx(stock[name], rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("loss", ["nll", "chunked_nll"])
def test_evaluation_of_the_loss_alone(tmp_path, tokenizer, data, loss):
    """The logits are not read: three evaluation batches, one of them without labels."""
    results = []
    for flags in (None, ONLY_LOSS):
        run = Run(tmp_path, tokenizer, data, loss, flags)
        results.append(run.trainer.evaluate())
    stock, fused = results
    assert set(fused) == set(stock)
    # The batch without labels makes the mean loss NaN in transformers, not in TRL's chunked loss.
    assert (stock["eval_loss"] != stock["eval_loss"]) == (loss == "nll" and not FUSED_HEAD)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert fused[name] == pytest.approx(stock[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    assert run.report.calls == 2 + 3 and not run.stock_calls


def test_chunked_evaluation_predicts_what_stock_predicts(tmp_path, tokenizer, data):
    """TRL's chunked loss gives no logits to predict either; what it gives is the same."""
    shapes = []
    for flags in (None, ONLY_LOSS):
        run = Run(tmp_path, tokenizer, data, "chunked_nll", flags)
        predicted = run.trainer.predict(data)
        shapes.append([np.asarray(x) for x in predicted.predictions])
    for stock, fused in zip(*shapes, strict=True):
        np.testing.assert_allclose(fused, stock, rtol=1e-4, atol=1e-6)


def test_generate_gives_the_stock_tokens(runs):
    prompt = torch.tensor([[5, 6, 7, 8]])
    for loss in LOSSES:
        tokens = [
            runs[loss, 1, fused]
            .trainer.model.eval()
            .generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
            for fused in (False, True)
        ]
        assert torch.equal(*tokens), loss


def test_full_fine_tuning_with_transformers_trainer(tmp_path, data, tokenizer):
    """No TRL, no adapter: the loss is fused wherever there is a causal LM."""
    from transformers import Trainer, TrainingArguments
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    logs = {}
    for fused in (False, True):
        trainer = Trainer(
            make_model(),
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4,
                max_steps=2,
                logging_steps=1,
                use_cpu=True,
                bf16=True,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
            ),
            DataCollatorForLanguageModeling(pad_token_id=0),
            data,
        )
        callback = LorafuseCallback(**ONLY_LOSS)
        if fused:
            trainer.add_callback(callback)
        trainer.train()
        logs[fused] = [log for log in trainer.state.log_history if "loss" in log]
    for mine, theirs in zip(logs[True], logs[False], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
