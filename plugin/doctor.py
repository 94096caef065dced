"""`lorafuse doctor`: what would be fused, what not and why, tried on a small stand-in of the model.

Fusing a model proves each distinct block against the stock one, and it does so on the stand-in as
on the real model. One training step on random tokens then shows what is really called.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from lorafuse.patches.fp8 import unavailable
from lorafuse.patches.label_places import IGNORED
from lorafuse.plugin.axolotl_yaml import check, names_plugin, why_aside
from lorafuse.plugin.config import EVERYTHING, FP8, GRAPHS, PREFIX, FuseConfig
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.fuse import fuse_with
from lorafuse.plugin.manager import Plugins
from lorafuse.plugin.report import FuseReport
from lorafuse.plugin.sketch import load_config, sketch, training_dtype

TOKENS = (2, 16)
PLUGIN_LINES = "plugins: [lorafuse.LorafusePlugin]"
# For a model without a YAML: LoRA on every linear layer, in bf16 as everybody trains.
DEFAULT_ADAPTER = {"adapter": "lora", "lora_r": 16, "lora_target_linear": True, "bf16": True}


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        report: Of the stand-in, after one step.
        model: One line on the model and its stand-in.
        advice: What to write into the YAML for this to happen; "" where it says so already.
    """

    report: FuseReport
    model: str
    advice: str


def diagnose(target: str) -> Diagnosis:
    """Fuses a small stand-in of a model on the CPU.

    Args:
        target: An Axolotl YAML, a model's folder, or the name of a model in the local cache.

    Raises:
        FuseConfigError: The YAML or the model cannot be read, or a setting is wrong.
        FuseError: The model does not build, or a third party's plugin failed.
    """
    path = Path(target)
    settings = read_yaml(path) if path.is_file() else DEFAULT_ADAPTER | {"base_model": target}
    config = check(settings)
    advice = ""
    if path.is_file():
        advice = _advice(settings, config)
    plugins = Plugins(config := config or FuseConfig())
    whole = load_config(settings)
    model = sketch(whole, settings)
    # A strict run is judged when all is known, so that the table can be seen first.
    # FP8 and graphs are a matter of the GPU, and this runs on the CPU.
    lenient = config.model_copy(update={"fused_strict": False, FP8: False, GRAPHS: False})
    report = fuse_with(model, lenient, plugins, why_aside(settings))
    _try_a_step(model, report, training_dtype(settings), padded=config.fused_padding_free)
    report.config = config
    if config.fused_fp8:
        gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report.notes.append(f"{FP8}: {unavailable(gpu) or 'this GPU can'}; tried here without it")
    if config.fused_graphs:
        report.notes.append(f"{GRAPHS}: for CUDA GPUs; tried here without it")
    return Diagnosis(report, _describe(whole, model, settings), advice)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of an Axolotl YAML.

    Raises:
        FuseConfigError: It is no YAML, or not one of Axolotl's.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise FuseConfigError(f"{path} is not a YAML file: {said}") from error
    if not isinstance(settings, dict):
        raise FuseConfigError(
            f"{path} is not an Axolotl YAML: it holds a {type(settings).__name__}, not settings"
        )
    if not settings.get("base_model"):
        raise FuseConfigError(f"{path} is not an Axolotl YAML: it has no `base_model`")
    return settings


def _advice(settings: Mapping[str, Any], config: FuseConfig | None) -> str:
    """What is missing in a YAML that would train as stock."""
    named = names_plugin(settings)
    if config is not None and not named:
        flag = next(name for name in settings if str(name).startswith((PREFIX, EVERYTHING)))
        raise FuseConfigError(
            f"`{flag}` has no effect, for `plugins` does not list lorafuse; add `{PLUGIN_LINES}`"
        )
    if config is not None:
        return ""
    missing = "`fused: true`" if named else f"`{PLUGIN_LINES}` and `fused: true`"
    return f"this YAML trains as stock; add {missing} for what the table shows"


def _describe(whole: PretrainedConfig, model: nn.Module, settings: Mapping[str, Any]) -> str:
    core = _core(model)
    layers = [c.get_text_config().num_hidden_layers for c in (whole, core.config)]
    dtype = str(training_dtype(settings)).removeprefix("torch.")
    return (
        f"{settings['base_model']}: {type(core).__name__}, {layers[0]} layers; tried on a copy of "
        f"{layers[1]} narrow layers with random weights, in {dtype}, on the CPU"
    )


def _core(model: nn.Module) -> Any:
    """The transformers model inside PEFT's."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _try_a_step(model: nn.Module, report: FuseReport, dtype: torch.dtype, *, padded: bool) -> None:
    """Forward and backward of random tokens, under autocast as the trainer does it.

    Args:
        model: fused.
        report: what the step is counted in.
        dtype: of autocast.
        padded: half of the last row is padding, and no KV cache is filled.
    """
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, 100, TOKENS, generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "SequenceClassification" in type(_core(model)).__name__:
        inputs["labels"] = torch.zeros(TOKENS[0], dtype=torch.long)
    else:
        inputs["labels"] = inputs["input_ids"]
    if padded:
        inputs["attention_mask"][-1, TOKENS[1] // 2 :] = 0
        inputs["use_cache"] = False
        if inputs["labels"].dim() > 1:
            inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    try:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()
    except Exception as error:  # any model's forward may raise anything; what is fused is known
        report.notes.append(
            f"no step could be tried on random tokens ({type(error).__name__}: {error}), so that "
            "`called` says nothing"
        )
        return
    report.steps = 1
