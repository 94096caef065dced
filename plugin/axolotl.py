"""`LorafusePlugin`: the flags in an Axolotl YAML.

    plugins:
      - lorafuse.LorafusePlugin
    fused: true

Flags are checked in `register`, on the raw YAML: the one place that can tell what the user wrote
from what Axolotl turned on, and before anything is loaded. Fusing waits for `post_trainer_create`,
where every kind of trainer has an unwrapped PEFT model. Each hook reads the flags from the config
that it is given, so that several configs in one process do not mix.
"""

from typing import Any, cast

from axolotl.integrations.base import BasePlugin
from pydantic import create_model
from torch import nn

from lorafuse.plugin import log
from lorafuse.plugin.axolotl_yaml import (
    AXOLOTL_KERNELS,
    check,
    names_plugin,
    read_flags,
    why_aside,
)
from lorafuse.plugin.config import EVERYTHING, PREFIX, FuseConfig
from lorafuse.plugin.environment import versions
from lorafuse.plugin.fuse import fuse_with
from lorafuse.plugin.manager import Plugins
from lorafuse.plugin.run import RunCallback

_FLAG_TYPES: dict[str, Any] = {EVERYTHING: bool} | {
    name: field.annotation for name, field in FuseConfig.model_fields.items()
}
# Axolotl mixes this class into its own config, or it would drop our keys in silence. The mixing
# goes by name, which must therefore be unique among all plugins. `register` has checked the values.
LorafuseArgs = create_model(
    "LorafuseArgs",
    __module__=__name__,
    **cast(Any, {name: (annotation | None, None) for name, annotation in _FLAG_TYPES.items()}),
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
        # Axolotl keeps a plugin for the life of the process, whatever the next config names.
        if not names_plugin(cfg):
            return
        config = check(cfg)
        banner = f"lorafuse {versions()['lorafuse']}"
        if config is None:
            log.info(
                f"{banner}: the YAML asks for nothing, so nothing is fused; add `fused: true`, "
                "or name some operations (fused_lora_mlp: true, ...)"
            )
            return
        self._plugins = Plugins(config)
        cfg.update(dict.fromkeys(AXOLOTL_KERNELS, False))
        # YAML reads a bare `off` as false, which the schema would refuse.
        cfg.update({name: value for name, value in config.model_dump().items() if name in cfg})
        asked = [PREFIX + name for name, on in config.enabled().items() if on]
        log.info(
            f"{banner}: will fuse {', '.join(asked)} when the trainer is built; "
            f"strict: {'yes' if config.fused_strict else 'no'}; "
            "Axolotl's own lora_*_kernel are switched off"
        )

    def post_model_build(self, cfg: Any, model: nn.Module) -> None:
        config = read_flags(cfg)
        if self._plugins is not None and config is not None:
            self._plugins.call("lorafuse_model_built", model=model, config=config)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Fuses `trainer.model` and adds the callback that follows the run.

        Raises:
            FuseError: `fused_strict` is set, and something cannot be fused.
        """
        config = read_flags(cfg)
        if self._plugins is None or config is None:
            return
        self._plugins.call("lorafuse_trainer_built", trainer=trainer, config=config)
        report = fuse_with(trainer.model, config, self._plugins, why_aside(cfg))
        trainer.add_callback(RunCallback(self._plugins, report))
