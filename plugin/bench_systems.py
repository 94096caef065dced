"""The systems that `lorafuse bench` compares, each set up as its own users set it up.

    stock     transformers + PEFT + bitsandbytes
    lorafuse  the same, then `fuse(model, FuseConfig(...), optimizer=...)`
    liger     Liger's kernels on the model before it gets adapters, as transformers' Trainer does it
              (`use_liger_kernel`), with the fused linear cross entropy
    axolotl   Axolotl's LoRA kernels (`lora_mlp_kernel`, `lora_qkv_kernel`, `lora_o_kernel`) over
              Liger's norms, RoPE and fused linear cross entropy, where Liger is installed

Liger and Axolotl patch classes and modules for the whole process: each system has its own.
"""

import tempfile
from importlib.util import find_spec
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lorafuse.plugin.bench_images import takes_images
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.fuse import fuse
from lorafuse.plugin.report import FuseReport

SYSTEMS = ("stock", "lorafuse", "liger", "axolotl")


class UnsupportedError(Exception):
    """The system is installed but does not know this model."""


def why_not(system: str, device: str) -> str | None:
    """Why a system cannot run here at all; None where it can."""
    package, pip_name = {
        "liger": ("liger_kernel", "liger-kernel"),
        "axolotl": ("axolotl",) * 2,
    }.get(system, (None, ""))
    if package is not None and find_spec(package) is None:
        return f"{pip_name} is not installed (pip install {pip_name})"
    if package is not None and device != "cuda":
        return "its kernels need a CUDA GPU"
    return None


def patch_base(base: PreTrainedModel, job: Job) -> str:
    """What a system does to the model before it has adapters.

    Returns:
        What is in it beside the system's own name, for the report.

    Raises:
        UnsupportedError: The system does not know this model.
    """
    if job.system in ("liger", "axolotl") and takes_images(base.config):
        raise UnsupportedError("its kernels are set up here for models of text alone")
    if job.system == "liger":
        _liger(base)
    elif job.system == "axolotl":
        with_liger = find_spec("liger_kernel") is not None
        if with_liger:
            # First: Axolotl's rewritten attention takes whatever RoPE the module has by then.
            _liger(base)
        _axolotl_attention(base)
        return "with Liger" if with_liger else "without Liger, which is not installed"
    return ""


def patch_model(model: PeftModel, optimizer: Any, job: Job) -> FuseReport | None:
    """What a system does to the PEFT model, its optimiser being there already."""
    if job.system == "lorafuse":
        return fuse(model, FuseConfig(**job.flags), optimizer=optimizer)
    if job.system == "axolotl":
        from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches

        try:
            apply_lora_kernel_patches(model, _axolotl_settings("unused"))
        except NotImplementedError as error:
            raise UnsupportedError(f"Axolotl's LoRA kernels: {error}") from error
    return None


def _liger(base: PreTrainedModel) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = base.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UnsupportedError(f"Liger has no kernels for model_type {kind}")
    _apply_liger_kernel_to_instance(model=base)


def _axolotl_attention(base: PreTrainedModel) -> None:
    from axolotl.monkeypatch.lora_kernels import patch_self_attn_lora

    # It finds the attention class by the config in the base model's folder.
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        try:
            patch_self_attn_lora(_axolotl_settings(folder))
        except (AssertionError, ValueError) as error:
            raise UnsupportedError(f"Axolotl's LoRA kernels: {error}") from error


def _axolotl_settings(folder: str) -> Any:
    from axolotl.utils.dict import DictDefault

    kernels = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
    return DictDefault({"base_model": folder} | dict.fromkeys(kernels, True))
