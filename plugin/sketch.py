"""A small stand-in of a model: same classes and structure, a few narrow layers, random weights.

It is made from the model's config alone, with the adapter, the quantisation and the dtype that an
Axolotl YAML asks for, so that fusing can be tried where the weights are not. What decides whether a
module is fused is kept: kinds of layers, heads shared by several queries or not, head size, biases,
activation, tied head. Only numbers of layers, heads, experts, words, and widths shrink.
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig

from lorafuse.plugin.errors import FuseConfigError, FuseError

Settings = Mapping[str, Any]

# Enough for what differs from layer to layer (sliding and full attention, dense and sparse MLPs).
MOST_LAYERS = 8
LEAST_LAYERS = 2
WORDS = 256
HIDDEN = 256
INTERMEDIATE = 384
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# What a LoRA setting of the YAML is called in PEFT. Settings that name single layers of the whole
# model (peft_layers_to_transform, peft_layers_pattern) have no meaning here.
_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}


def load_config(settings: Settings) -> PretrainedConfig:
    """The config of `base_model`, from a folder or the local cache; nothing is downloaded.

    Raises:
        FuseConfigError: There is none here, or it cannot be overridden so.
    """
    name = str(settings.get("base_model_config") or settings["base_model"])
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        hint = "; it holds an adapter: give the folder of its base model" if adapter else ""
        raise FuseConfigError(f"{name} is not a model: it has no config.json{hint}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name,
            local_files_only=True,
            trust_remote_code=settings.get("trust_remote_code") is True,
            revision=settings.get("revision_of_model") or "main",
        )
    except (OSError, ValueError, StrictDataclassFieldValidationError) as error:
        if folder.is_dir():
            said = " ".join(str(error).split())
            raise FuseConfigError(f"the config of {name} cannot be read: {said}") from error
        raise FuseConfigError(
            f"{name} is neither a folder here nor a model in the local Hugging Face cache, and "
            "nothing is downloaded; fetch its config (no weights) with "
            f"`hf download {name} config.json`, or give a folder"
        ) from error
    overrides = settings.get("overrides_of_model_config") or {}
    if not isinstance(overrides, Mapping):
        raise FuseConfigError(
            f"`overrides_of_model_config: {overrides!r}` is not supported; give settings of the "
            "model's config, as in `num_hidden_layers: 8`, or drop the line"
        )
    for key, value in overrides.items():
        try:
            setattr(config, key, value)
        except StrictDataclassFieldValidationError as error:
            raise FuseConfigError(
                f"`overrides_of_model_config: {{{key}: {value!r}}}` is not supported by "
                f"{type(config).__name__}: {' '.join(str(error).split())}"
            ) from error
    return config


def training_dtype(settings: Settings) -> torch.dtype:
    """The dtype that Axolotl loads the weights in; its `auto` counts as bf16."""
    if settings.get("bf16") or settings.get("bfloat16"):
        return torch.bfloat16
    if settings.get("load_in_8bit") or settings.get("fp16") or settings.get("float16"):
        return torch.float16
    return torch.float32


def sketch(config: PretrainedConfig, settings: Settings) -> nn.Module:
    """The small stand-in on the CPU, quantised and with its adapter.

    Args:
        config: The config of the whole model; only read.
        settings: An Axolotl YAML. A `lora_target_modules` of "all-linear" is PEFT's.

    Raises:
        FuseConfigError: An adapter or a quantisation that this cannot build.
        FuseError: transformers or PEFT cannot build it.
    """
    options = _quantisation(config, settings)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _narrow_or_wide(config, settings)
        if options is not None:
            model = _quantised(model, options, training_dtype(settings))
        return _adapted(model, settings)


def shrink(config: PretrainedConfig, widths: bool = True) -> PretrainedConfig:
    """A copy of `config` with few layers and words, and with `widths` also narrow ones."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for part in {id(part): part for part in (small, text, *_sub_configs(small))}.values():
        _shrink_depth(part)
    if widths:
        _shrink_widths(text)
    for part in (small, text):
        if isinstance(getattr(part, "vocab_size", None), int):
            part.vocab_size = min(part.vocab_size, WORDS)
        # An embedding refuses a padding token beyond its end.
        if isinstance(pad := getattr(part, "pad_token_id", None), int) and pad >= WORDS:
            part.pad_token_id = 0
    return small


def _sub_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [part for part in parts if isinstance(part, PretrainedConfig)]


def _shrink_depth(config: PretrainedConfig) -> None:
    """Keeps the first layer of each kind that the config's lists of layers tell apart."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= LEAST_LAYERS:
        return
    lists = {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == layers}
    kinds = [repr([one[i] for one in lists.values()]) for i in range(layers)]
    kept = [i for i in range(layers) if kinds[i] not in kinds[:i]][:MOST_LAYERS]
    others = [i for i in range(layers) if i not in kept]
    kept = sorted(kept + others[: max(0, LEAST_LAYERS - len(kept))])
    config.num_hidden_layers = len(kept)
    for name, one in lists.items():
        setattr(config, name, [one[i] for i in kept])
    if isinstance(getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = min(config.first_k_dense_replace, 1)


def _shrink_widths(config: PretrainedConfig) -> None:
    """Fewer heads of the same size (tables of RoPE depend on it), and narrower rows."""
    heads, hidden = getattr(config, "num_attention_heads", None), config.hidden_size
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    size = getattr(config, "head_dim", None) or hidden // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    new_shared = min(shared, 2)
    new_heads = new_shared if shared == heads else 2 * new_shared
    attention = new_heads * size
    if hidden == heads * size:
        new_hidden = attention
    else:
        new_hidden = HIDDEN if attention != HIDDEN else HIDDEN + 64
    config.num_attention_heads, config.hidden_size = new_heads, new_hidden
    if isinstance(getattr(config, "num_key_value_heads", None), int):
        config.num_key_value_heads = new_shared
    for name in ("intermediate_size", "moe_intermediate_size", "n_inner"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, INTERMEDIATE)
    for name in _EXPERTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 4))
    if isinstance(getattr(config, "num_experts_per_tok", None), int):
        config.num_experts_per_tok = min(config.num_experts_per_tok, 2)
    for name in ("n_group", "topk_group"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)


def _narrow_or_wide(config: PretrainedConfig, settings: Settings) -> nn.Module:
    """The narrow model; with its own widths where the class refuses narrow ones."""
    try:
        return _built(shrink(config), settings)
    except FuseConfigError:
        raise
    except Exception:  # a model class may refuse sizes in any way; the next line says if it is that
        pass
    try:
        return _built(shrink(config, widths=False), settings)
    except Exception as error:
        raise FuseError(
            f"{type(config).__name__} does not build from its config: "
            f"{type(error).__name__}: {error}"
        ) from error


def _built(config: PretrainedConfig, settings: Settings) -> nn.Module:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    name = settings.get("model_type") or _auto_class(config, settings)
    model_class: Any = getattr(transformers, str(name), None)
    if model_class is None:
        raise FuseConfigError(f"`model_type: {name}` is not a class of transformers")
    options: dict[str, Any] = {"dtype": training_dtype(settings)}
    if settings.get("eager_attention") or settings.get("attn_implementation") == "eager":
        options["attn_implementation"] = "eager"
    if str(name).startswith("Auto"):
        trusted = settings.get("trust_remote_code") is True
        model: nn.Module = model_class.from_config(config, trust_remote_code=trusted, **options)
    else:
        model = model_class._from_config(config, **options)
    return model.train()


def _auto_class(config: PretrainedConfig, settings: Settings) -> str:
    if settings.get("reward_model"):
        return "AutoModelForSequenceClassification"
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return "AutoModelForCausalLM"
    return "AutoModelForImageTextToText"


def _quantisation(config: PretrainedConfig, settings: Settings) -> dict[str, Any] | None:
    """The options of the bitsandbytes quantisation that the checkpoint or the YAML asks for."""
    own = getattr(config, "quantization_config", None)
    if own is not None:
        own = own if isinstance(own, dict) else own.to_dict()
        method = own.get("quant_method")
        if method != "bitsandbytes":
            raise FuseConfigError(
                f"the checkpoint is quantised with {method}, which has no small stand-in; "
                "lorafuse reads bitsandbytes' 4-bit weights and plain ones, and trains others as "
                "stock"
            )
        return {k: v for k, v in own.items() if k != "quant_method" and not k.startswith("_")}
    if settings.get("load_in_4bit"):
        options: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": training_dtype(settings),
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": torch.bfloat16,
        }
        return options | (settings.get("bnb_config_kwargs") or {})
    return {"load_in_8bit": True} if settings.get("load_in_8bit") else None


def _quantised(model: nn.Module, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model as transformers loads it from a quantised checkpoint: through a folder."""
    saved: Any = model
    how: Any = BitsAndBytesConfig
    with tempfile.TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        try:
            loaded: nn.Module = type(saved).from_pretrained(
                folder,
                config=saved.config,
                quantization_config=how(**options),
                dtype=dtype,
                device_map={"": "cpu"},
                local_files_only=True,
            )
        except ImportError as error:
            raise FuseError(f"the YAML quantises, and that fails here: {error}") from error
    return loaded.train()


def _adapted(model: nn.Module, settings: Settings) -> nn.Module:
    adapter = settings.get("adapter")
    if not adapter:
        return model
    if adapter not in ("lora", "qlora"):
        raise FuseConfigError(f"`adapter: {adapter}` is not supported; use lora or qlora")
    saved = settings.get("lora_model_dir")
    try:
        if saved and Path(saved).is_dir():
            lora = PeftConfig.from_pretrained(saved)
            lora.inference_mode = False
        else:
            options = {ours: settings[name] for name, ours in _LORA.items() if settings.get(name)}
            if settings.get("lora_target_linear"):
                options["target_modules"] = "all-linear"
            lora = LoraConfig(task_type=_task(model), **options)
        # On top of the stock classes there is no type for what PEFT accepts.
        return get_peft_model(model, lora)  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError) as error:
        raise FuseConfigError(f"PEFT refuses the adapter's settings: {error}") from error


def _task(model: nn.Module) -> str:
    return "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else "CAUSAL_LM"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no remarks of transformers about random weights."""
    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
