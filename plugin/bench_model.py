"""The model that every system of `lorafuse bench` starts from, the same to the last bit.

Weights, adapters and tokens come from fixed seeds, each seeded anew, so that nothing that a system
draws in between can shift them. Everything is what TRL's and Axolotl's QLoRA runs have: weights in
bf16 or NF4, adapters in fp32. Norms, embedding and head stay in bf16, unless the job says that
PEFT's `prepare_model_for_kbit_training` makes them fp32, as its own guide has it: Axolotl casts
them back, and TRL does not call it.
"""

from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lorafuse.patches.label_places import IGNORED
from lorafuse.plugin.bench_images import image_rows, takes_images
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometries import Model

# B is zero in a fresh adapter: then neither the loss nor A's gradient would show what LoRA does.
B_STD = 0.01
WEIGHT_STD = 0.02


def base_model(model: Model, job: Job) -> PreTrainedModel:
    """The model on the job's device, its weights loaded where the folder holds some."""
    own = getattr(model.config, "quantization_config", None)
    if model.weights is not None:
        return _loaded(model, job, own)
    if own is not None:
        del model.config.quantization_config
    return _random(model, job)


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' (untyped there): of a model that is trained with images, or of a causal LM."""
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def parameters(model: Model) -> int:
    """How many parameters the whole model has. Nothing is allocated."""
    with torch.device("meta"):
        empty = auto_class(model.config).from_config(model.config)
    empty.tie_weights()
    return sum(parameter.numel() for parameter in empty.parameters())


def adapted(base: PreTrainedModel, job: Job) -> PeftModel:
    """With LoRA on every linear layer (of both towers) but the head, ready to train."""
    if job.prepare_kbit:
        prepare: Any = prepare_model_for_kbit_training
        base = prepare(base, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=job.rank, lora_alpha=job.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=B_STD)
    model.train()
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def inputs(job: Job, config: PretrainedConfig) -> dict[str, Tensor]:
    """A step's arguments on the CPU, as a collator gives them, with images where it takes some."""
    if takes_images(config):
        return image_rows(config, job)
    return batch(job, config.get_text_config().vocab_size)


def batch(job: Job, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens on the CPU, as a collator gives them; all int64 of shape (batch, tokens).

    Packed documents have positions that start again, no attention mask, and no label on their
    first token, which the document before cannot predict (as TRL and Axolotl pack). Padded rows get
    shorter evenly from the first, which is full, and have no labels on their padding.
    """
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocabulary, (job.batch, job.tokens), generator=generator)
    if job.padding:
        short = torch.linspace(0, 2 * job.padding, job.batch)[:, None] * job.tokens
        mask = (torch.arange(job.tokens) < (job.tokens - short).round().clamp(min=2)).long()
        labels = ids.masked_fill(mask == 0, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if job.documents == 1:
        return {"input_ids": ids, "labels": ids.clone()}
    positions = torch.arange(job.tokens // job.documents).repeat(job.batch, job.documents)
    labels = ids.masked_fill(positions == 0, IGNORED)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _attention(model: Model, job: Job) -> str | None:
    """What was asked for (None: transformers chooses), eager where the class has no sdpa."""
    found = auto_class(model.config)._model_mapping.get(type(model.config), None)
    if job.attention == "sdpa" and not getattr(found, "_supports_sdpa", True):
        return "eager"
    return job.attention


def nf4_quantisation() -> BitsAndBytesConfig:
    """As QLoRA has it: NF4, double quantised, computed in bf16."""
    how: Any = BitsAndBytesConfig  # untyped there
    found: BitsAndBytesConfig = how(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return found


def _loaded(model: Model, job: Job, own: Any) -> PreTrainedModel:
    quantisation = None
    if own is not None:
        method = (own if isinstance(own, dict) else own.to_dict()).get("quant_method")
        if method != "bitsandbytes" or job.quant != "nf4":
            raise FuseConfigError(
                f"the weights in {model.weights} are quantised with {method}; --quant nf4 reads "
                "bitsandbytes' 4-bit weights, --quant none plain ones"
            )
    elif job.quant == "nf4":
        quantisation = nf4_quantisation()
    loaded: PreTrainedModel = auto_class(model.config).from_pretrained(
        model.weights,
        config=model.config,
        dtype=torch.bfloat16,
        quantization_config=quantisation,
        device_map={"": 0 if job.device == "cuda" else "cpu"},
        attn_implementation=_attention(model, job),
        local_files_only=True,
    )
    return loaded


def _random(model: Model, job: Job) -> PreTrainedModel:
    """Layer by layer on the device, so that no more than one is there before it is quantised."""
    device = torch.device(job.device)
    with init_empty_weights(include_buffers=False):
        base: PreTrainedModel = auto_class(model.config).from_config(
            model.config, dtype=torch.bfloat16, attn_implementation=_attention(model, job)
        )
    torch.manual_seed(0)
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    if job.quant == "nf4":
        for name, module in list(base.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                base.set_submodule(name, _nf4(module, device))
    for module in base.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(key, nn.Parameter(_drawn(key, parameter, device), False))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    base.tie_weights()
    if job.quant == "nf4":
        # As loading does. Without it PEFT takes its plain LoRA layer and not the one for 4 bit,
        # which every QLoRA run has, and which is slower and larger.
        base.is_loaded_in_4bit = True  # type: ignore[assignment]
    return base


def _drawn(key: str, like: Tensor, device: torch.device) -> Tensor:
    if like.dim() > 1:
        return torch.randn(like.shape, device=device, dtype=torch.bfloat16).mul_(WEIGHT_STD)
    value = 0.0 if key == "bias" else 1.0
    return torch.full(like.shape, value, device=device, dtype=torch.bfloat16)


def _nf4(linear: nn.Linear, device: torch.device) -> nn.Module:
    """A bitsandbytes Linear4bit of the same shape: NF4, blocks of 64, double quantised."""
    import bitsandbytes as bnb

    layer: nn.Module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    data = _drawn("weight", linear.weight, device)
    weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight._quantize(device)
    return layer
