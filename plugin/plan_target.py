"""What `lorafuse plan` is asked about: an Axolotl YAML, a geometry, or a model's folder."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lorafuse.plugin.axolotl_yaml import check, why_aside
from lorafuse.plugin.config import FOLDED_WEIGHTS
from lorafuse.plugin.doctor import read_yaml
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometries import keep_layers
from lorafuse.plugin.geometry_table import GEOMETRIES
from lorafuse.plugin.plan_groups import ALL_LINEAR, MOST, Targets, Workload
from lorafuse.plugin.plan_model import model_shape
from lorafuse.plugin.sketch import load_config, training_dtype

Settings = Mapping[str, Any]

# Of a target without a YAML: as `lorafuse bench`.
DEFAULTS: dict[str, Any] = {"tokens": 4096, "batch": 2, "rank": 32, "quant": "nf4"}
# Axolotl's own defaults.
_SEQUENCE_LEN, _MICRO_BATCH, _LORA_R, _OPTIMIZER = 512, 1, 8, "adamw_torch_fused"
_OPTIMIZERS = {
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_apex_fused": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
}
# Settings with memory of their own that is not predicted.
_UNPREDICTED = {
    "load_in_8bit": "8-bit weights are trained as stock",
    "peft_use_dora": "DoRA is trained as stock",
    "lora_modules_to_save": "whole modules are trained beside the adapters",
    "lora_target_parameters": "adapters on bare parameters are trained as stock",
    "unfrozen_parameters": "base weights are trained",
    "relora": "the optimiser's states come and go",
    "peft_layers_to_transform": "only some layers carry adapters",
}
_SHARDED = ("fsdp", "fsdp_config", "deepspeed", "tensor_parallel_size", "context_parallel_size")


def read_target(target: str, options: Mapping[str, Any]) -> tuple[Workload, list[str]]:
    """The workload that a target means, and what else is to be said of it.

    Args:
        target: An Axolotl YAML, a name of `GEOMETRIES`, or a folder with a `config.json`.
        options: Fields of `Workload` that come before what the YAML says, and `layers`: only the
            model's first ones. None: not given.

    Raises:
        FuseConfigError: There is no such target, or a setting that is not predicted.
    """
    given = {name: value for name, value in options.items() if value is not None}
    layers = given.pop("layers", None)
    path = Path(target)
    notes: list[str] = []
    if path.is_file():
        settings = read_yaml(path)
        check(settings)
        fields, notes = _fields(settings)
        if given.get("prepare_kbit"):
            raise FuseConfigError(
                "--prepare-kbit is for a script of your own; Axolotl casts what "
                "prepare_model_for_kbit_training made fp32 back. Leave it out, or name a geometry "
                "or a model's folder instead of a YAML"
            )
        config, name = load_config(settings), str(settings["base_model"])
    elif target in GEOMETRIES:
        settings, fields, config, name = {}, dict(DEFAULTS), GEOMETRIES[target].config(), target
    elif target and path.is_dir():
        settings, fields, name = {"base_model": target}, dict(DEFAULTS), target
        config = load_config(settings)
    else:
        raise FuseConfigError(_unknown(target))
    fields |= _own_quantisation(config, name)
    if layers is not None:
        keep_layers(config, layers)
    shape = model_shape(name, config, trust_remote_code=settings.get("trust_remote_code") is True)
    workload = Workload(shape, **(fields | given))
    if any(layer.window and workload.tokens > layer.window for layer in shape.layers):
        notes.append(
            "rows longer than the sliding window go through torch's attention with a dense mask, "
            "whose memory grows with the square of their length and is predicted roughly"
        )
    if shape.eager:
        notes.append(
            f"{type(config).__name__} has only eager attention in this transformers: what that "
            "keeps, heads x the square of the rows' length, is not predicted"
        )
    return workload, notes


def read_GB(target: str, flag: str) -> float | None:
    """`fused_memory_gb` or `fused_host_gb` of a YAML that `read_target` has read; None: not set."""
    path = Path(target)
    found = read_yaml(path).get(flag) if path.is_file() else None
    return None if found is None else float(found)


def read_targets(text: str) -> Targets:
    """`--targets`: names with commas between, `all-linear`, or a regular expression."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise FuseConfigError(
            f"--targets {text!r} names nothing; give names, as in q_proj,v_proj, or {ALL_LINEAR}"
        )
    plain = all(word.replace("_", "").replace(".", "").isalnum() for word in words)
    return text if text == ALL_LINEAR or not plain else words


def _unknown(target: str) -> str:
    near = get_close_matches(target, GEOMETRIES, n=1, cutoff=0.5)
    meant = f"did you mean `{near[0]}`? " if near else ""
    return (
        f"{target or repr(target)} is neither a YAML file, nor a geometry, nor a folder; {meant}"
        f"the geometries are {', '.join(GEOMETRIES)}; or give an Axolotl YAML, or the folder of a "
        "model, which at least holds a config.json"
    )


def _fields(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Fields of `Workload` that a YAML sets, and notes."""
    if settings.get("adapter") not in ("lora", "qlora"):
        raise FuseConfigError(
            f"`adapter: {settings.get('adapter')}` is not predicted; `lorafuse plan` is for "
            "`adapter: lora` and `adapter: qlora`"
        )
    quantised = _switch(settings, "load_in_4bit")
    _switch(settings, "load_in_8bit")
    for name, why in _UNPREDICTED.items():
        if settings.get(name):
            raise FuseConfigError(
                f"`{name}` is not predicted, for {why}; remove it to see the plan without it"
            )
    if training_dtype(settings) == torch.float32:
        raise FuseConfigError(
            "the YAML trains in fp32, which is not predicted; write `bf16: true` (or `auto`)"
        )
    notes = []
    aside = why_aside(settings)
    if aside:
        notes.append(f"nothing would be fused, and only the last row holds: {aside}")
    if any(settings.get(name) for name in _SHARDED):
        notes.append("this is for one GPU that holds everything; sharding needs less on each")
    optimizer = str(settings.get("optimizer") or _OPTIMIZER)
    if optimizer not in _OPTIMIZERS:
        raise FuseConfigError(
            f"`optimizer: {optimizer}` is not predicted; use one of {', '.join(_OPTIMIZERS)}, or "
            "say `--optimizer adamw_8bit` or `--optimizer adamw` for the one with the states "
            "nearest to it"
        )
    if optimizer.startswith("paged"):
        notes.append("the paged optimiser's states are counted on the GPU; they may leave it")
    if settings.get("sample_packing"):
        notes.append(
            "packed rows are counted as one document each; of several, attention takes less time"
        )
    quantisation = settings.get("bnb_config_kwargs") or {}
    if not isinstance(quantisation, Mapping):
        raise FuseConfigError(
            f"`bnb_config_kwargs: {quantisation!r}` is not supported; give settings, as in "
            "`bnb_4bit_use_double_quant: true`, or drop the line"
        )
    fields = {
        "tokens": _whole(settings, "sequence_len", _SEQUENCE_LEN, least=2),
        "batch": _whole(settings, "micro_batch_size", _MICRO_BATCH),
        "rank": _whole(settings, "lora_r", _LORA_R),
        "quant": "nf4" if quantised else "none",
        "double_quant": bool(quantisation.get("bnb_4bit_use_double_quant", True)),
        "targets": _targets(settings),
        "optimizer": _OPTIMIZERS[optimizer],
        "adapter_bytes": 2 if settings.get("peft_autocast_adapter_dtype") is False else 4,
        "accumulates": _whole(settings, "gradient_accumulation_steps", 1) > 1,
        "folded_weights": settings.get(FOLDED_WEIGHTS) is True,
    }
    return fields, notes


def _whole(settings: Settings, name: str, default: int, least: int = 1) -> int:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise FuseConfigError(
            f"`{name}: {value!r}` is not supported; give a whole number from {least} to {MOST:,}"
        )
    return value


def _switch(settings: Settings, name: str) -> bool:
    value = settings.get(name)
    if value not in (None, True, False):
        raise FuseConfigError(f"`{name}: {value!r}` is not supported; write true or false")
    return bool(value)


def _targets(settings: Settings) -> Targets:
    named = settings.get("lora_target_modules")
    if settings.get("lora_target_linear") or not named:
        return ALL_LINEAR
    if isinstance(named, str):
        return named
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise FuseConfigError(
            f"`lora_target_modules: {named!r}` is not supported; give a list of names, as in "
            "[q_proj, v_proj], or a regular expression"
        )
    return tuple(named)


def _own_quantisation(config: PretrainedConfig, name: str) -> dict[str, Any]:
    """What a quantised checkpoint says of itself."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return {}
    own = own if isinstance(own, dict) else own.to_dict()
    method = own.get("quant_method")
    if method != "bitsandbytes" or not own.get("load_in_4bit", True):
        raise FuseConfigError(
            f"the weights of {name} are quantised with {method}, which is not predicted; "
            "bitsandbytes' 4-bit weights and plain ones are"
        )
    return {"quant": "nf4", "double_quant": bool(own.get("bnb_4bit_use_double_quant", False))}
