"""`LorafusePlugin`: the flags in an Axolotl YAML.

    plugins:
      - lorafuse.LorafusePlugin
    fused: true

Flags are checked in `register`, on the raw YAML: the one place that can tell what the user wrote from what
Axolotl turned on, and before anything is loaded. Fusing waits for `post_trainer_create`, where every kind
of trainer has an unwrapped PEFT model. The plugin keeps no flags itself: each hook reads them from the
config that it is given, so that several configs in one process do not mix.
"""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import create_model
from torch import nn

from lorafuse.plugin import log
from lorafuse.plugin.config import EVERYTHING, PREFIX, FuseConfig
from lorafuse.plugin.environment import versions
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.fuse import fuse_with
from lorafuse.plugin.manager import Plugins
from lorafuse.plugin.run import RunCallback

AXOLOTL_KERNELS = (
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "lora_embedding_kernel",
)
OTHER_CROSS_ENTROPIES = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "flash_attn_cross_entropy",
)
UNSLOTH_FLAGS = {
    "unsloth_lora_mlp": "fused_lora_mlp",
    "unsloth_lora_qkv": "fused_lora_qkv",
    "unsloth_lora_o": "fused_lora_o",
    "unsloth_rms_norm": "fused_rms_norm",
    "unsloth_rope": "fused_rope",
    "unsloth_cross_entropy_loss": "fused_cross_entropy",
}
# Settings that give the forwards that we would replace, or the weights that we would read, to something else.
OWNERS = {
    "torch_compile": "compiles the model's forwards",
    "tiled_mlp": "replaces the MLP's forward",
    "use_kernels": "replaces forwards with kernels from the Hub",
    "layer_offloading": "moves a layer's weights while its own forward runs",
    "fp8": "replaces the linear layers' arithmetic",
    "qat": "replaces the linear layers with fake-quantised ones",
    "use_onebitllms": "replaces the linear layers",
    "fused_attn_kernel": "replaces the attention's norms and rotary embedding",
}
PARALLEL_OWNERS = {
    "tensor_parallel_size": "splits the weights of one layer over several GPUs",
    "context_parallel_size": "splits the sequence over several GPUs inside the attention",
}

# Axolotl mixes this class into its own config, or it would drop our keys in silence. The mixing goes by
# name, which must therefore be unique among all plugins. The values were checked in `register`.
LorafuseArgs = create_model(
    "LorafuseArgs",
    __module__=__name__,
    **{  # type: ignore[call-overload]
        name: (annotation | None, None)
        for name, annotation in [
            (EVERYTHING, bool),
            *((name, field.annotation) for name, field in FuseConfig.model_fields.items()),
        ]
    },
)


class LorafusePlugin(BasePlugin):  # type: ignore[misc]
    """Fuses the model of an Axolotl run."""

    def __init__(self) -> None:
        super().__init__()
        self._plugins: Plugins | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.{LorafuseArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Checks the flags and says what will be done.

        Raises:
            FuseConfigError: A wrong flag, or a setting of Axolotl that contradicts one.
            FuseError: A third party's plugin does not load.
        """
        self._plugins = None
        # Axolotl keeps plugins for the life of the process, whatever the next config names.
        if not any(name.split(".")[0] == "lorafuse" for name in cfg.get("plugins") or []):
            return
        _refuse_unsloth_flags(cfg)
        config = _read(cfg)
        banner = f"lorafuse {versions()['lorafuse']}"
        if config is None:
            log.info(
                f"{banner}: the YAML asks for nothing, so nothing is fused; add `fused: true`, "
                "or name some operations (fused_lora_mlp: true, ...)"
            )
            return
        _refuse_axolotl_kernels(cfg)
        if config.fused_cross_entropy:
            _refuse_second_cross_entropy(cfg)
        cfg.update(dict.fromkeys(AXOLOTL_KERNELS, False))
        cfg.update(_normalised(cfg, config))
        self._plugins = Plugins(config)
        asked = [PREFIX + name for name, on in config.enabled().items() if on]
        log.info(
            f"{banner}: will fuse {', '.join(asked)} when the trainer is built; "
            f"strict: {'yes' if config.fused_strict else 'no'}; "
            "Axolotl's own lora_*_kernel are switched off"
        )

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        config = _read(cfg)
        if self._plugins is not None and config is not None:
            self._plugins.call("lorafuse_model_built", model=model, config=config)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Fuses `trainer.model` and adds the callback that follows the run.

        Raises:
            FuseError: `fused_strict` is set, and something cannot be fused.
        """
        config = _read(cfg)
        if self._plugins is None or config is None:
            return
        self._plugins.call("lorafuse_trainer_built", trainer=trainer, config=config)
        report = fuse_with(trainer.model, config, self._plugins, why_aside(cfg))
        trainer.add_callback(RunCallback(self._plugins, report))


def why_aside(cfg: Mapping[str, Any]) -> str | None:
    """The setting that gives the model's forwards to something else, or None."""
    for name, what in OWNERS.items():
        if cfg.get(name):
            return f"`{name}` {what}; remove it to fuse"
    for name, what in PARALLEL_OWNERS.items():
        if (cfg.get(name) or 1) > 1:
            return f"`{name}: {cfg[name]}` {what}; remove it to fuse"
    return None


def _read(cfg: Mapping[str, Any]) -> FuseConfig | None:
    return FuseConfig.from_yaml(cfg, not_ours=AxolotlInputConfig.model_fields)


def _normalised(cfg: Mapping[str, Any], config: FuseConfig) -> dict[str, Any]:
    """Our keys as the schema wants them: YAML reads a bare `off` as false."""
    return {name: value for name, value in config.model_dump().items() if name in cfg}


def _refuse_unsloth_flags(cfg: Mapping[str, Any]) -> None:
    found = [name for name in UNSLOTH_FLAGS if cfg.get(name)]
    if found:
        ours = ", ".join(f"{UNSLOTH_FLAGS[name]} for {name}" for name in found)
        raise FuseConfigError(
            f"{', '.join(found)}: Axolotl has removed these flags; write {ours}, or `fused: true`"
        )


def _refuse_axolotl_kernels(cfg: Mapping[str, Any]) -> None:
    found = [name for name in AXOLOTL_KERNELS if cfg.get(name)]
    if found:
        raise FuseConfigError(
            f"{found[0]}: true contradicts the fused_* flags, for both replace the same forwards; "
            f"remove {', '.join(found)} (lorafuse switches Axolotl's kernels off by itself), or "
            "remove the fused_* flags"
        )


def _refuse_second_cross_entropy(cfg: Mapping[str, Any]) -> None:
    found = [name for name in OTHER_CROSS_ENTROPIES if cfg.get(name)]
    # That plugin turns itself on.
    named = any("cut_cross_entropy" in name for name in cfg.get("plugins") or [])
    if named and cfg.get("cut_cross_entropy") is None:
        found.append("cut_cross_entropy (its plugin is in `plugins`)")
    if found:
        raise FuseConfigError(
            f"fused_cross_entropy and {found[0]} are two cross-entropy optimisations, and only one "
            f"can be on; remove {' and '.join(found)}, or set `fused_cross_entropy: false`"
        )
