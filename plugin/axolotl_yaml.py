"""What an Axolotl YAML says about us: the flags, and the settings that contradict them.

Knows the keys, and imports nothing of Axolotl: `lorafuse doctor` reads YAMLs on machines without
it.
"""

from collections.abc import Mapping
from typing import Any

from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.errors import FuseConfigError

Settings = Mapping[str, Any]

# Axolotl's own keys that look like ours.
NOT_OURS = frozenset({"fused_attn_kernel"})
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
# Settings that give the forwards that we would replace, or the weights that we would read, to
# something else.
OWNERS = {
    "tiled_mlp": "replaces the MLP's forward",
    "use_kernels": "replaces forwards with kernels from the Hub",
    "layer_offloading": "moves a layer's weights while the layer's own forward runs",
    "fp8": "replaces the linear layers' arithmetic",
    "qat": "replaces the linear layers with fake-quantised ones",
    "use_onebitllms": "replaces the linear layers",
    "fused_attn_kernel": "replaces the attention's norms and rotary embedding",
}
PARALLEL_OWNERS = {
    "tensor_parallel_size": "splits the weights of one layer over several GPUs",
    "context_parallel_size": "splits the sequence over several GPUs inside the attention",
}


def names_plugin(settings: Settings) -> bool:
    """Whether `plugins` lists ours."""
    return any(name.split(".")[0] == "lorafuse" for name in _plugins(settings))


def _plugins(settings: Settings) -> list[str]:
    found = settings.get("plugins") or []
    if not isinstance(found, list):
        raise FuseConfigError(
            f"`plugins: {found!r}` is not supported; give a list, as in "
            "`plugins: [lorafuse.LorafusePlugin]`"
        )
    return [str(name) for name in found]


def read_flags(settings: Settings) -> FuseConfig | None:
    """The flags, or None where nothing is asked for.

    Raises:
        FuseConfigError: A wrong flag.
    """
    return FuseConfig.from_yaml(settings, not_ours=NOT_OURS)


def check(settings: Settings) -> FuseConfig | None:
    """The flags of a YAML as the user wrote it, after every check that needs no model.

    Raises:
        FuseConfigError: A wrong flag, or a setting of Axolotl that contradicts one.
    """
    _refuse_unsloth_flags(settings)
    config = read_flags(settings)
    if config is not None:
        _refuse_axolotl_kernels(settings)
        if config.fused_cross_entropy:
            _refuse_second_cross_entropy(settings)
    return config


def why_aside(settings: Settings) -> str | None:
    """The setting that gives the model's forwards to something else, or None.

    Raises:
        FuseConfigError: A number of GPUs that is none.
    """
    for name, what in OWNERS.items():
        if settings.get(name):
            return f"`{name}` {what}; remove it to fuse"
    for name, what in PARALLEL_OWNERS.items():
        count = settings.get(name) or 1
        if not isinstance(count, int):
            raise FuseConfigError(
                f"`{name}: {count!r}` is not supported; give a whole number, or drop the line"
            )
        if count > 1:
            return f"`{name}: {settings[name]}` {what}; remove it to fuse"
    return None


def _refuse_unsloth_flags(settings: Settings) -> None:
    found = [name for name in UNSLOTH_FLAGS if settings.get(name)]
    if found:
        ours = ", ".join(f"`{UNSLOTH_FLAGS[name]}` for `{name}`" for name in found)
        raise FuseConfigError(
            f"`{found[0]}: true` is not supported, for Axolotl has removed its Unsloth flags; "
            f"write {ours}, or `fused: true` for everything"
        )


def _refuse_axolotl_kernels(settings: Settings) -> None:
    found = [name for name in AXOLOTL_KERNELS if settings.get(name)]
    if found:
        raise FuseConfigError(
            f"`{found[0]}: true` contradicts the fused_* flags, for both replace the same "
            f"forwards; remove {', '.join(found)} (lorafuse switches Axolotl's own kernels off by "
            "itself), or remove the fused_* flags"
        )


def _refuse_second_cross_entropy(settings: Settings) -> None:
    found = [f"`{name}`" for name in OTHER_CROSS_ENTROPIES if settings.get(name)]
    # That plugin turns itself on.
    named = any("cut_cross_entropy" in name for name in _plugins(settings))
    if named and settings.get("cut_cross_entropy") is None:
        found.append("`cut_cross_entropy` (its plugin is listed in `plugins`)")
    if found:
        raise FuseConfigError(
            f"`fused_cross_entropy` and {found[0]} are two cross-entropy optimisations, and only "
            f"one can be on; remove {' and '.join(found)}, or set `fused_cross_entropy: false`"
        )
