"""`fuse`: fuses any PEFT model, whatever it is wrapped in."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorafuse.patches.apply import FusedModel, OperationRecord, apply
from lorafuse.patches.checkpointing import OPERATION as CHECKPOINTING
from lorafuse.patches.modes import AUTO
from lorafuse.patches.optimizer import fuse_optimizer
from lorafuse.patches.structure import NO_EXPERTS
from lorafuse.patches.traversal import flatten_traversal
from lorafuse.plugin import log
from lorafuse.plugin.config import (
    FOLDED_WEIGHTS,
    FP8,
    GRAPHS,
    MOE,
    OPTIMIZER,
    PADDING_FREE,
    PREFIX,
    TRAVERSAL,
    FuseConfig,
)
from lorafuse.plugin.errors import FuseConfigError, FuseError
from lorafuse.plugin.manager import Plugins
from lorafuse.plugin.report import FuseReport

COPIED = (
    "DataParallel copies it to every GPU in each step, and fused forwards would stay on the first: "
    "start one process a GPU (torchrun, accelerate launch)"
)
# The report of each model that is fused now, so that fusing again starts from the stock model.
_fused: "WeakKeyDictionary[nn.Module, FuseReport]" = WeakKeyDictionary()


def fuse(
    model: nn.Module,
    config: FuseConfig | None = None,
    optimizer: Any = None,
    **flags: Any,
) -> FuseReport:
    """Fuses a model in place, on its module instances only.

    A model that is fused already is first unfused, so the result is that of the new flags alone.
    DistributedDataParallel, DeepSpeed's engine and what torch.compile returns are looked through. A
    model that DataParallel copies or that FSDP has sharded stays as it is, with that reason in the
    report; one that was fused before FSDP took it stays fused, and its report is returned.

    Args:
        model: Any `nn.Module`; a PEFT model for the LoRA operations.
        config: The flags. Without it, the keyword flags, all on where there are none.
        optimizer: What `fused_optimizer` is for; trainers' own is found by the callback.
        **flags: The flags of `FuseConfig`, in place of `config`.

    Returns:
        The report; its `unfuse()` restores the model.

    Raises:
        FuseConfigError: A wrong flag, or both `config` and flags.
        FuseError: With `fused_strict`, something cannot be fused; the model is the stock one then.
            Or a third party's plugin failed.
        TypeError: `model` is not a module.
    """
    config = resolve_config(config, flags)
    report = fuse_with(model, config, Plugins(config))
    try:
        add_optimizer(report, optimizer)
    except FuseError:
        report.unfuse()
        raise
    return report


def resolve_config(config: FuseConfig | None, flags: Mapping[str, Any]) -> FuseConfig:
    """One configuration from either a `FuseConfig` or keyword flags."""
    if config is None:
        return FuseConfig(**flags)
    if flags:
        raise FuseConfigError(f"give either a FuseConfig or flags, not both: got {sorted(flags)}")
    if not isinstance(config, FuseConfig):
        raise FuseConfigError(f"config must be a FuseConfig, got {type(config).__name__}")
    return config


def fuse_with(
    model: nn.Module, config: FuseConfig, plugins: Plugins, aside: str | None = None
) -> FuseReport:
    """`fuse` with plugins that are loaded already.

    Args:
        model: As for `fuse`.
        config: The flags.
        plugins: The plugins of this run.
        aside: Where the trainer has given the model's forwards to something else: why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fuse needs a torch.nn.Module (a PEFT model), got {type(model).__name__}; "
            "for a trainer, give its `.model`"
        )
    sharded = why_sharded(model)
    model, forbidden = unwrap(model)
    if sharded is not None and model in _fused:  # it was fused in time, and cannot be once more
        return _fused[model]
    if model in _fused:
        _fused[model].unfuse()
        del _fused[model]
    plugins.call("lorafuse_adapter_attached", model=model, config=config)
    aside = aside or forbidden or sharded
    fused = _stand_aside(config, aside) if aside else _apply(model, config, plugins)
    if config.fused_moe and MOE in config.model_fields_set:
        _say_no_experts(model, fused)
    report = FuseReport(
        config, fused.records, fused.unfuse, fused.notes, fused.fp8_noise, fused.checkpointing,
        fused.masks, fused.proofs, fused.proving_s,
    )  # fmt: skip
    _add_traversal(report, model, aside)
    try:
        report.check_fused()
    except Exception:
        report.unfuse()
        raise
    _fused[model] = report
    return report


def _add_traversal(report: FuseReport, model: nn.Module, aside: str | None) -> None:
    """Flattens the walks over a model of which something else is fused, where that is asked for."""
    config = report.config
    if not config.fused_traversal:
        return
    is_fused = any(one.fused for one in report.operations().values())
    found = flatten_traversal(model) if is_fused else None
    if found:
        report.add(found, found.undo)
    elif TRAVERSAL in config.model_fields_set:
        why = aside or ("its walks are not torch's" if is_fused else "nothing else of it is fused")
        report.add(_not_fused(TRAVERSAL.removeprefix(PREFIX), why))


def add_optimizer(report: FuseReport, optimizer: Any) -> None:
    """Fuses the optimiser as the report's flags say, and enters it into the report.

    Raises:
        FuseError: with `fused_strict`, `fused_optimizer` was asked for by name, in vain.
    """
    config = report.config
    if optimizer is None or not config.fused_optimizer:
        return
    fused = fuse_optimizer(optimizer)
    reason = "" if fused is None else fused.reason
    if fused is not None:
        report.add(fused, fused.undo)
    elif OPTIMIZER in config.model_fields_set:
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        reason = f"{name} is not one of bitsandbytes' 8-bit optimisers (optim: adamw_bnb_8bit)"
    if reason and OPTIMIZER in config.model_fields_set:
        if config.fused_strict:
            raise FuseError(f"{OPTIMIZER}: {reason}; set `{OPTIMIZER}: false` to go on without it")
        log.warning(f"{OPTIMIZER}: {reason}; it is left as it is")


def why_sharded(model: nn.Module) -> str | None:
    """Why the weights of a wrapped model cannot be read until it runs, or None.

    Nothing in it may be called alone, either: FSDP would take the first module called for its root.
    """
    wrapped = any(_is_fsdp_1(module) for module in model.modules())
    if wrapped or any(hasattr(p, "placements") for p in model.parameters()):
        return (
            "its weights are sharded by now (FSDP): fuse it before it is wrapped, with "
            "`lorafuse.fuse(trainer.model)` ahead of `trainer.train()`"
        )
    return None


def unwrap(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Looks through the wrappers. Returns the model, and which of them forbids to fuse it, why."""
    forbidden = None
    while True:
        if isinstance(model, DataParallel) and len(model.device_ids) > 1:
            inner, forbidden = model._modules["module"], COPIED
        elif isinstance(model, DataParallel | DistributedDataParallel) or _is_engine(model):
            inner = model._modules.get("module") or model._modules.get("_fsdp_wrapped_module")
        else:
            inner = model._modules.get("_orig_mod")  # of what torch.compile returns
        if inner is None:
            return model, forbidden
        model = inner


def _is_engine(model: nn.Module) -> bool:
    return _is_fsdp_1(model) or type(model).__module__.startswith("deepspeed.")


def _is_fsdp_1(model: nn.Module) -> bool:
    return type(model).__name__ == "FullyShardedDataParallel"


def _say_no_experts(model: nn.Module, fused: FusedModel) -> None:
    """Dense models have none, which is no fallback; but whoever names the flag is to know."""
    operation = MOE.removeprefix(PREFIX)
    if not any(record.operation == operation for record in fused.records):
        fused.records.append(
            _not_fused(operation, f"{NO_EXPERTS} was found in {type(model).__name__}")
        )


def _not_fused(operation: str, reason: str) -> OperationRecord:
    return OperationRecord(operation, "", False, reason=reason)


def _apply(model: nn.Module, config: FuseConfig, plugins: Plugins) -> FusedModel:
    return apply(
        model,
        config.enabled(),
        structures=plugins.contributions("lorafuse_structures"),
        weight_formats=plugins.contributions("lorafuse_weight_formats"),
        attention=config.fused_attention,
        fp8=config.fused_fp8,
        checkpointing=config.fused_checkpointing,
        budget_bytes=None if config.fused_memory_gb is None else 1e9 * config.fused_memory_gb,
        host_limit_bytes=None if config.fused_host_gb is None else 1e9 * config.fused_host_gb,
        graphs=config.fused_graphs,
        folded_weights=config.fused_folded_weights,
        padding_free=config.fused_padding_free,
    )


def _stand_aside(config: FuseConfig, reason: str) -> FusedModel:
    asked = [name for name, on in config.enabled().items() if on]
    flags = (FP8, GRAPHS, FOLDED_WEIGHTS, PADDING_FREE)
    asked += [flag.removeprefix(PREFIX) for flag in flags if getattr(config, flag)]
    asked += [CHECKPOINTING] if config.fused_checkpointing != AUTO else []
    return FusedModel(records=[_not_fused(name, reason) for name in asked])
