"""The flags: what they turn on, and what a wrong one is told."""

from typing import Any

import pytest

from lorafuse.plugin.axolotl_yaml import (
    AXOLOTL_KERNELS,
    NOT_OURS,
    OTHER_CROSS_ENTROPIES,
    OWNERS,
    PARALLEL_OWNERS,
    UNSLOTH_FLAGS,
    check,
    why_aside,
)
from lorafuse.plugin.config import OPERATIONS, SWITCHES, FuseConfig
from lorafuse.plugin.errors import FuseConfigError


def on(config: FuseConfig | None) -> set[str]:
    assert config is not None
    return {f"fused_{name}" for name, asked in config.enabled().items() if asked}


EVERYTHING = set(OPERATIONS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, EVERYTHING),
        ({"fused_rope": False}, EVERYTHING - {"fused_rope"}),
        ({"fused_strict": True}, EVERYTHING),
        ({"fused_attention": "off"}, EVERYTHING - {"fused_attention"}),
        ({"fused_lora_mlp": True}, {"fused_lora_mlp"}),
        ({"fused_lora_mlp": True, "fused_rope": False}, {"fused_lora_mlp"}),
        ({"fused_attention": "sdpa"}, {"fused_attention"}),
        ({"fused_attention": "off", "fused_lora_o": True}, {"fused_lora_o"}),
        (dict.fromkeys(SWITCHES, False) | {"fused_attention": "off"}, set()),
    ],
)
def test_python_flags(flags: dict[str, Any], expected: set[str]) -> None:
    config = FuseConfig(**flags)
    assert on(config) == expected
    assert FuseConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fused": True}, EVERYTHING),
        ({"fused": True, "fused_lora_mlp": True}, EVERYTHING),
        ({"fused": True, "fused_rope": False}, EVERYTHING - {"fused_rope"}),
        ({"fused": True, "fused_attention": False}, EVERYTHING - {"fused_attention"}),
        ({"fused_lora_qkv": True, "fused_rope": True}, {"fused_lora_qkv", "fused_rope"}),
        ({"fused_attention": "auto"}, {"fused_attention"}),
        ({"fused_lora_mlp": None, "fused_lora_o": True}, {"fused_lora_o"}),
    ],
)
def test_yaml_flags(settings: dict[str, Any], expected: set[str]) -> None:
    assert on(FuseConfig.from_yaml(settings | {"base_model": "x"})) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fused": False},
        {"fused": None},
        {"fused": False, "fused_strict": True},
        {"fused_lora_mlp": False},
        {"base_model": "x", "lora_r": 8, "fused_attn_kernel": True},
    ],
)
def test_a_yaml_that_asks_for_nothing(settings: dict[str, Any]) -> None:
    assert FuseConfig.from_yaml(settings, NOT_OURS) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fused_lora_mpl": True}, "did you mean `fused_lora_mlp`?"),
        ({"fuse_rope": True}, "did you mean `fused_rope`?"),
        ({"fused-lora-mlp": True}, "did you mean `fused_lora_mlp`?"),
        ({"fused_nonsense_xyz": True}, "`fused_nonsense_xyz` is not a flag of lorafuse"),
        ({"fused_lora_mlp": "yes"}, "`fused_lora_mlp: 'yes'` is not supported; use true or false"),
        ({"fused_rope": 1}, "use true or false"),
        ({"fused_strict": "hard", "fused": True}, "use true or false"),
        ({"fused": "all"}, "write `fused: true` for all operations"),
        ({"fused": 1}, "write `fused: true` for all operations"),
        ({"fused_attention": True}, "use auto, sdpa or off"),
        ({"fused_attention": "flash"}, "use auto, sdpa or off"),
        ({"fused": False, "fused_rope": True}, "`fused: false` contradicts `fused_rope: true`"),
        ({"fused_strict": True}, "has no effect"),
        ({"fused_checkpointing": "auto"}, "has no effect"),
        ({"fused_checkpointing": "some", "fused": True}, "use off, selective, offload or auto"),
        ({"fused_checkpointing": True, "fused": True}, "use off, selective, offload or auto"),
        ({"fused_memory_gb": 0, "fused": True}, "give the GB of GPU memory"),
        ({"fused_memory_gb": "24GB", "fused": True}, "give the GB of GPU memory"),
        ({"fused_memory_gb": True, "fused": True}, "give the GB of GPU memory"),
        ({"fused_memory_gb": "24", "fused": True}, "`fused_memory_gb: '24'` is not supported"),
        ({"fused_memory_gb": -1, "fused": True}, "a number above 0 and at most 10,000"),
        ({"fused_memory_gb": float("nan"), "fused": True}, "`fused_memory_gb: nan` is not"),
        ({"fused_memory_gb": 24e9, "fused": True}, "a number above 0 and at most 10,000"),
        ({"fused_host_gb": float("nan"), "fused": True}, "a number up to 10,000"),
        ({"fused_host_gb": float("inf"), "fused": True}, "a number up to 10,000"),
        ({"fused_host_gb": -1, "fused": True}, "give the GB of the host's memory"),
        ({"fused_host_gb": "32GB", "fused": True}, "give the GB of the host's memory"),
    ],
)
def test_wrong_yaml_flags(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FuseConfigError) as error:
        FuseConfig.from_yaml(settings)
    assert message in str(error.value)


@pytest.mark.parametrize("mode", ["selective", "offload", "off", "auto"])
def test_modes_of_checkpointing(mode: str) -> None:
    assert FuseConfig(fused_checkpointing=mode).fused_checkpointing == mode
    # YAML 1.1 reads a bare `off` as false.
    settings = {"fused": True, "fused_checkpointing": mode if mode != "off" else False}
    config = FuseConfig.from_yaml(settings)
    assert config is not None and config.fused_checkpointing == mode and config.fused_rope


def test_memory_is_for_auto() -> None:
    assert FuseConfig(fused_host_gb=0).fused_host_gb == 0
    for flags, said in (
        ({"fused_checkpointing": "off", "fused_host_gb": 4}, "has no effect"),
        ({"fused_checkpointing": "offload", "fused_host_gb": 0}, "no memory to offload to"),
    ):
        with pytest.raises(FuseConfigError, match=said):
            FuseConfig(**flags)
    assert FuseConfig(fused_memory_gb=22).fused_memory_gb == 22
    config = FuseConfig.from_yaml({"fused": True, "fused_memory_gb": 14.5})
    assert config is not None and config.fused_memory_gb == 14.5
    with pytest.raises(FuseConfigError, match="has no effect with `fused_checkpointing: offload`"):
        FuseConfig(fused_memory_gb=22, fused_checkpointing="offload")


def test_a_flag_cannot_change_afterwards() -> None:
    with pytest.raises(Exception, match="frozen"):
        FuseConfig().fused_rope = False  # type: ignore[misc]


class TestAxolotlYaml:
    @pytest.mark.parametrize("kernel", AXOLOTL_KERNELS)
    def test_both_kernels(self, kernel: str) -> None:
        with pytest.raises(FuseConfigError, match=f"`{kernel}: true` contradicts"):
            check({"fused": True, kernel: True})
        assert check({"fused": True, kernel: False}) == FuseConfig()
        assert check({kernel: True}) is None

    @pytest.mark.parametrize("other", OTHER_CROSS_ENTROPIES)
    def test_two_cross_entropies(self, other: str) -> None:
        with pytest.raises(FuseConfigError, match=f"`{other}` are two cross-entropy"):
            check({"fused": True, other: True})
        config = check({"fused": True, "fused_cross_entropy": False, other: True})
        assert on(config) == EVERYTHING - {"fused_cross_entropy"}

    def test_a_cross_entropy_plugin_that_turns_itself_on(self) -> None:
        plugins = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
        with pytest.raises(FuseConfigError, match="its plugin is listed"):
            check({"fused": True, "plugins": plugins})
        off = {"fused": True, "plugins": plugins, "cut_cross_entropy": False}
        assert check(off) == FuseConfig()

    @pytest.mark.parametrize(("theirs", "ours"), UNSLOTH_FLAGS.items())
    def test_unsloth_flags_are_told_ours(self, theirs: str, ours: str) -> None:
        with pytest.raises(FuseConfigError, match=f"write `{ours}` for `{theirs}`"):
            check({theirs: True})

    @pytest.mark.parametrize("owner", [*OWNERS, *PARALLEL_OWNERS])
    def test_it_stands_aside(self, owner: str) -> None:
        value = 2 if owner in PARALLEL_OWNERS else True
        reason = why_aside({owner: value})
        assert reason is not None and owner in reason and "remove it" in reason
        assert why_aside({owner: 1 if owner in PARALLEL_OWNERS else False}) is None


def test_axolotl_knows_every_key_that_is_named_here() -> None:
    """A key that Axolotl renames would make a check of ours say nothing from then on."""
    from axolotl.integrations.cut_cross_entropy.args import CutCrossEntropyArgs
    from axolotl.integrations.liger.args import LigerArgs
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = {
        *AxolotlInputConfig.model_fields,
        *LigerArgs.model_fields,
        *CutCrossEntropyArgs.model_fields,
    }
    named = {*AXOLOTL_KERNELS, *OTHER_CROSS_ENTROPIES, *OWNERS, *PARALLEL_OWNERS, *NOT_OURS}
    assert named <= known


def test_no_key_of_axolotl_is_taken_for_ours() -> None:
    from axolotl.integrations.liger.args import LigerArgs
    from axolotl.utils.schemas.config import AxolotlInputConfig

    for key in {*AxolotlInputConfig.model_fields, *LigerArgs.model_fields}:
        assert FuseConfig.from_yaml({key: True}, NOT_OURS) is None, key


def test_axolotl_mixes_in_every_flag() -> None:
    from lorafuse.plugin.axolotl import LorafuseArgs

    assert set(LorafuseArgs.model_fields) == {"fused", *FuseConfig.model_fields}
    assert all(value is None for value in LorafuseArgs().model_dump().values())


@pytest.mark.parametrize("flag", ["fused_graphs", "fused_folded_weights", "fused_padding_free"])
def test_nothing_turns_what_is_in_trial_on_but_its_own_flag(flag: str) -> None:
    assert not getattr(FuseConfig(), flag)
    config = FuseConfig.from_yaml({"fused": True})
    assert config is not None and not getattr(config, flag)
    config = check({"fused": True, flag: True})
    assert config is not None and getattr(config, flag)
    assert config.enabled() == FuseConfig().enabled()
    with pytest.raises(FuseConfigError, match="no operation is asked for"):
        FuseConfig.from_yaml({flag: True})
