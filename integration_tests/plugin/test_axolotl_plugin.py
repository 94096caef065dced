"""`LorafusePlugin`: what `register` refuses, what it writes into the config, and when it acts.

Runs of the whole trainer are in e2e/; here the plugin meets Axolotl's own config classes and a real
trainer.
"""

from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from transformers import Trainer, TrainingArguments

from lorafuse import LorafusePlugin
from lorafuse.plugin.axolotl_yaml import AXOLOTL_KERNELS, OTHER_CROSS_ENTROPIES, UNSLOTH_FLAGS
from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.errors import FuseConfigError, FuseError

OURS = {"plugins": ["lorafuse.LorafusePlugin"]}


def settings(**more: Any) -> DictDefault:
    return DictDefault(OURS | more)


def build_trainer(model: Any, folder: Path) -> Trainer:
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    return Trainer(model=model, args=args)


@pytest.mark.parametrize("kernel", AXOLOTL_KERNELS)
def test_axolotls_kernels_beside_ours_are_an_error(kernel: str) -> None:
    with pytest.raises(FuseConfigError, match=f"`{kernel}: true` contradicts the fused_"):
        LorafusePlugin().register(settings(fused_lora_mlp=True, **{kernel: True}))


@pytest.mark.parametrize("other", OTHER_CROSS_ENTROPIES)
def test_a_second_cross_entropy_is_an_error(other: str) -> None:
    with pytest.raises(FuseConfigError, match=f"`{other}` are two cross-entropy optimisations"):
        LorafusePlugin().register(settings(fused=True, **{other: True}))


@pytest.mark.parametrize(("theirs", "ours"), UNSLOTH_FLAGS.items())
def test_an_unsloth_flag_is_an_error_with_the_new_name(theirs: str, ours: str) -> None:
    with pytest.raises(FuseConfigError, match=f"write `{ours}` for `{theirs}`"):
        LorafusePlugin().register(settings(**{theirs: True}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fused_lora_mpl": True}, "did you mean `fused_lora_mlp`"),
        ({"fused_attention": "flash"}, "use auto, sdpa or off"),
        ({"fused_checkpointing": "some"}, "use off, selective, offload or auto"),
        ({"fused": "yes"}, "write `fused: true`"),
        ({"fused_strict": True}, "has no effect"),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(FuseConfigError, match=message):
        LorafusePlugin().register(settings(**flags))


def test_register_switches_axolotls_kernels_off_and_says_so(capfd) -> None:
    cfg = settings(fused_lora_mlp=True, fused_attention=False)
    LorafusePlugin().register(cfg)
    assert [cfg[kernel] for kernel in AXOLOTL_KERNELS] == [False] * 4
    assert cfg["fused_attention"] == "off"
    assert "fused_lora_qkv" not in cfg
    said = capfd.readouterr().err
    assert "will fuse fused_lora_mlp when the trainer is built" in said
    assert "lora_*_kernel are switched off" in said


def test_register_leaves_a_yaml_alone_that_does_not_name_us(capfd) -> None:
    # Axolotl keeps a plugin of an earlier config in this process, and calls it.
    cfg = DictDefault({"plugins": ["some.Other"], "fused_lora_mlp": True, "lora_mlp_kernel": True})
    LorafusePlugin().register(cfg)
    assert cfg["lora_mlp_kernel"] is True and capfd.readouterr().err == ""


def test_a_yaml_that_asks_for_nothing_is_told(capfd) -> None:
    cfg = settings(lora_mlp_kernel=True)
    LorafusePlugin().register(cfg)
    assert "asks for nothing, so nothing is fused; add `fused: true`" in capfd.readouterr().err
    assert cfg["lora_mlp_kernel"] is True


def test_the_flags_survive_axolotls_config_classes() -> None:
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args

    PluginManager.get_instance().register("lorafuse.LorafusePlugin")
    merged, _ = merge_input_args()
    assert {"fused", *FuseConfig.model_fields} <= set(merged.model_fields)


def test_it_fuses_when_the_trainer_is_built(llama, tmp_path) -> None:
    cfg, plugin = settings(fused=True, fused_rope=False), LorafusePlugin()
    plugin.register(cfg)
    trainer = build_trainer(llama, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    plugin.post_trainer_create(cfg, trainer)
    (callback,) = [one for one in trainer.callback_handler.callbacks if one not in before]
    operations = callback.report.operations()
    assert operations["lora_mlp"].fused == 2 and not operations["rope"].asked
    assert "forward" in llama.base_model.model.model.layers[0].mlp.__dict__


def test_it_does_nothing_for_a_config_that_does_not_name_it(llama, tmp_path) -> None:
    plugin = LorafusePlugin()
    plugin.register(settings(fused=True))
    other = DictDefault({"fused": True})
    plugin.register(other)
    trainer = build_trainer(llama, tmp_path)
    plugin.post_trainer_create(other, trainer)
    assert not any("forward" in module.__dict__ for module in llama.modules())


def test_it_stands_aside_where_a_setting_owns_the_forwards(llama, tmp_path) -> None:
    cfg, plugin = settings(fused=True, tiled_mlp=True), LorafusePlugin()
    plugin.register(cfg)
    trainer = build_trainer(llama, tmp_path)
    plugin.post_trainer_create(cfg, trainer)
    report = trainer.callback_handler.callbacks[-1].report
    assert "`tiled_mlp` replaces the MLP" in str(report.operations()["lora_mlp"].fallbacks[0])
    strict = settings(fused=True, tiled_mlp=True, fused_strict=True)
    plugin.register(strict)
    with pytest.raises(FuseError, match="`tiled_mlp` replaces the MLP's forward"):
        plugin.post_trainer_create(strict, trainer)
