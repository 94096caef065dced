"""`FuseConfig`: the flags, with the same names in an Axolotl YAML and in Python.

One rule holds in both: naming an operation turns on the operations that are named, and only these;
naming none (or only those that are to stay off) turns on all the others. A YAML has one more word,
`fused`: without it, and without an operation, nothing is fused.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from lorafuse.plugin.errors import FuseConfigError

SWITCHES = (
    "fused_lora_mlp",
    "fused_lora_qkv",
    "fused_lora_o",
    "fused_cross_entropy",
    "fused_rms_norm",
    "fused_rope",
    "fused_moe",
)
OPERATIONS = (*SWITCHES, "fused_attention")
MOE = "fused_moe"
# What is fused beside the model's own operations.
OPTIMIZER = "fused_optimizer"
TRAVERSAL = "fused_traversal"
FP8 = "fused_fp8"
GRAPHS = "fused_graphs"
FOLDED_WEIGHTS = "fused_folded_weights"
PADDING_FREE = "fused_padding_free"
# The operations whose base weights FP8 and folded weights are for.
WITH_BASE_WEIGHTS = ("fused_lora_mlp", "fused_lora_qkv", "fused_lora_o")
# On where no operation is named, off where others are.
_BESIDE = (OPTIMIZER, TRAVERSAL)
_NAMED = (*OPERATIONS, *_BESIDE)
EVERYTHING = "fused"
PREFIX = "fused_"
# Of memory, in GB: no machine has more, and who writes more means MB or bytes.
MOST_GB = 10_000


class FuseConfig(BaseModel):
    """What to fuse.

    Attributes:
        fused_lora_mlp: Gated MLPs with LoRA on any of gate, up and down.
        fused_lora_qkv: The query, key and value projections with LoRA on any of them.
        fused_lora_o: The attention's output projection with LoRA.
        fused_cross_entropy: Language-model head and loss, without the logits of the whole batch.
        fused_rms_norm: RMS norms, plain and with the 1 + weight of Gemma.
        fused_rope: Rotary position embedding of queries and keys.
        fused_moe: The experts of a mixture of experts, with LoRA on them or frozen. The router
            stays as it is.
        fused_attention: `auto` picks the fastest backend here, `sdpa` keeps torch's own choice,
            `off` leaves the attention alone.
        fused_optimizer: bitsandbytes' 8-bit optimisers update all tensors without waiting for the
            GPU after each. Other optimisers stay as they are.
        fused_traversal: Trainers walk over all modules several times a step, while the GPU waits;
            the walks over decoder layers take a fraction of the time.
        fused_fp8: The base GEMMs of the LoRA operations in FP8 (e4m3, a scale for each token):
            faster on Hopper and newer GPUs, and coarser than bf16. LoRA's own part keeps its
            precision. Neither `fused: true` nor naming no operation turns it on.
        fused_graphs: Decoder layers that are fused whole are replayed as CUDA graphs where batches
            keep one shape, so that the host is not what short ones wait for. In trial: off unless
            it is set.
        fused_folded_weights: Base weights of the compute dtype (bf16 LoRA) lie in buffers with room
            for LoRA while the model is fused, so that they are not copied in each pass. Faster; but
            their parameters are views whose rows lie apart, which who reads a weight by its address
            must not meet. Off unless it is set.
        fused_padding_free: Decoder layers compute a padded batch without its padding; labels, head
            and loss see the shapes that they always see. For batches that are padded, not packed.
            Off unless it is set.
        fused_checkpointing: What decoder layers that are fused whole keep for backward, in place of
            the trainer's own gradient checkpointing. `off` keeps all, `selective` computes again
            what is cheap, `offload` also moves what it keeps to the host, `auto` picks for each
            layer the fastest of these that the GPU's memory has room for. Where the host has room,
            gate and up of some layers wait there instead of being computed again.
        fused_memory_gb: GPU memory that `auto` may plan for, in GB of 1e9 bytes; without it, all
            that the GPU has.
        fused_host_gb: The host's memory that activations of this process may take, in GB of 1e9
            bytes; 0: none. Without it, as much as `offload` needs, and of what is free half for
            what is merely faster.
        fused_strict: An operation that cannot be fused, or is never called, stops the run.
        fused_plugins: Load third parties' plugins (entry-point group `lorafuse`).
            The environment variable `LORAFUSE_PLUGINS=0` switches them off too.
        fused_trace: Log every call of a hook. `LORAFUSE_TRACE=1` does so too.

    Raises:
        FuseConfigError: A flag is unknown or has a value that is not supported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fused_lora_mlp: StrictBool = True
    fused_lora_qkv: StrictBool = True
    fused_lora_o: StrictBool = True
    fused_cross_entropy: StrictBool = True
    fused_rms_norm: StrictBool = True
    fused_rope: StrictBool = True
    fused_moe: StrictBool = True
    fused_attention: Literal["auto", "sdpa", "off"] = "auto"
    fused_optimizer: StrictBool = True
    fused_traversal: StrictBool = True
    fused_fp8: StrictBool = False
    fused_graphs: StrictBool = False
    fused_folded_weights: StrictBool = False
    fused_padding_free: StrictBool = False
    fused_checkpointing: Literal["off", "selective", "offload", "auto"] = "auto"
    fused_memory_gb: float | None = Field(default=None, gt=0, le=MOST_GB, strict=True)
    fused_host_gb: float | None = Field(default=None, ge=0, le=MOST_GB, strict=True)
    fused_strict: StrictBool = False
    fused_plugins: StrictBool = True
    fused_trace: StrictBool = False

    def __init__(self, **flags: Any) -> None:
        try:
            super().__init__(**flags)
        except ValidationError as error:
            raise FuseConfigError(_explain(error)) from None
        for flag in (FP8, FOLDED_WEIGHTS):
            if getattr(self, flag) and not any(getattr(self, name) for name in WITH_BASE_WEIGHTS):
                *others, last = WITH_BASE_WEIGHTS
                raise FuseConfigError(
                    f"`{flag}: true` has no effect without {', '.join(others)} or {last}, "
                    "whose base weights it is for; turn one of them on, or drop the line"
                )
        if self.fused_padding_free and self.fused_attention != "auto":
            raise FuseConfigError(
                f"`fused_padding_free: true` has no effect with `fused_attention: "
                f"{self.fused_attention}`, under which packed tokens are a dense mask; use "
                "`fused_attention: auto`, or drop the line"
            )
        if self.fused_padding_free and self.fused_graphs:
            raise FuseConfigError(
                "`fused_padding_free: true` makes batches of ever new sizes, and `fused_graphs: "
                "true` is for batches that keep one; drop one of them"
            )
        if self.fused_memory_gb is not None and self.fused_checkpointing != "auto":
            raise FuseConfigError(
                f"`fused_memory_gb: {self.fused_memory_gb:g}` has no effect with "
                f"`fused_checkpointing: {self.fused_checkpointing}`, which plans nothing; use "
                "`fused_checkpointing: auto`, or drop the line"
            )
        if self.fused_host_gb is not None:
            limit = f"`fused_host_gb: {self.fused_host_gb:g}`"
            if self.fused_checkpointing == "off":
                raise FuseConfigError(
                    f"{limit} has no effect with `fused_checkpointing: off`, which keeps all on "
                    "the GPU; use another mode, or drop the line"
                )
            if self.fused_checkpointing == "offload" and not self.fused_host_gb:
                raise FuseConfigError(
                    f"{limit} leaves `fused_checkpointing: offload` no memory to offload to; give "
                    "more, or use selective"
                )

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_named(cls, flags: dict[str, Any]) -> dict[str, Any]:
        flags = _without_yaml_booleans(flags)
        if named_on(flags):
            off = {"fused_attention": "off"} | dict.fromkeys(_BESIDE, False)
            return dict.fromkeys(SWITCHES, False) | off | flags
        return flags

    @classmethod
    def from_yaml(
        cls,
        settings: Mapping[str, Any],
        not_ours: Collection[str] = (),
    ) -> Self | None:
        """Reads the flags out of a trainer's YAML.

        Args:
            settings: The whole YAML. `fused` and the keys that start with `fused_` are ours.
            not_ours: Keys of the trainer's own that start so (Axolotl has `fused_attn_kernel`).

        Returns:
            The configuration, or None where nothing is asked for.

        Raises:
            FuseConfigError: A flag is unknown, has a value that is not supported, contradicts
                another one, or would have no effect.
        """
        flags = {
            name: value
            for name, value in settings.items()
            if _looks_like_ours(str(name)) and name not in not_ours and value is not None
        }
        everything = settings.get(EVERYTHING)
        if everything is not None and not isinstance(everything, bool):
            raise FuseConfigError(
                f"fused: {everything!r} is not supported; write `fused: true` for all operations, "
                "or drop the line and name the operations (fused_lora_mlp: true, ...)"
            )
        config = cls(**flags)
        asked = named_on(_without_yaml_booleans(flags))
        if everything:
            on = {"fused_attention": "auto"} | dict.fromkeys(_BESIDE, True)
            config = cls(**(dict.fromkeys(SWITCHES, True) | on | flags))
            # `model_fields_set` stays what the user has named.
            return cls.model_construct(_fields_set=set(flags), **config.model_dump())
        if asked:
            if everything is False:
                raise FuseConfigError(
                    f"`fused: false` contradicts `{asked[0]}: {_as_yaml(flags[asked[0]])}`; "
                    "drop one of the two lines"
                )
            return config
        idle = [name for name in flags if name not in _NAMED]
        if idle and everything is None:
            raise FuseConfigError(
                f"`{idle[0]}: {_as_yaml(flags[idle[0]])}` has no effect, for no operation is asked "
                "for; add `fused: true` for all of them, or name some (fused_lora_mlp: true, ...)"
            )
        return None

    def enabled(self) -> dict[str, bool]:
        """Per operation, by the engine's name (no `fused_`), whether it is asked for."""
        return {name.removeprefix(PREFIX): is_on(getattr(self, name)) for name in OPERATIONS}


def is_on(value: object) -> bool:
    """Whether an operation's value asks for it: true, or any mode but `off`."""
    return value not in (False, "off", None)


def named_on(flags: Mapping[str, Any]) -> list[str]:
    return [name for name in _NAMED if name in flags and is_on(flags[name])]


def _looks_like_ours(name: str) -> bool:
    # `fuse_lora_mlp` is a slip of the pen, and Axolotl would drop it in silence.
    return name.startswith(PREFIX) or bool(
        name.startswith("fuse") and get_close_matches(name, FuseConfig.model_fields, cutoff=0.85)
    )


def _without_yaml_booleans(flags: Mapping[str, Any]) -> dict[str, Any]:
    """YAML reads a bare `off` as false; for the flags that have modes it means the mode `off`."""
    modes = ("fused_attention", "fused_checkpointing")
    return {n: "off" if n in modes and value is False else value for n, value in flags.items()}


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(str(one["loc"][0]), one["input"]) for one in error.errors())


def _explain_one(name: str, value: object) -> str:
    flags = list(FuseConfig.model_fields)
    if name not in flags:
        near = get_close_matches(name, flags, n=1, cutoff=0.6)
        meant = f"did you mean `{near[0]}`? " if near else ""
        return f"`{name}` is not a flag of lorafuse; {meant}The flags are: {', '.join(flags)}"
    if name == "fused_checkpointing":
        return (
            f"`fused_checkpointing: {_as_yaml(value)}` is not supported; use off, selective, "
            "offload or auto"
        )
    written = repr(value) if isinstance(value, str) else _as_yaml(value)  # a number in quotes
    if name == "fused_memory_gb":
        return (
            f"`fused_memory_gb: {written}` is not supported; give the GB of GPU memory "
            "that fused_checkpointing: auto may plan for, a number above 0 and at most "
            f"{MOST_GB:,}, as in 22.5"
        )
    if name == "fused_host_gb":
        return (
            f"`fused_host_gb: {written}` is not supported; give the GB of the host's "
            f"memory that activations may take, a number up to {MOST_GB:,}, as in 32, or 0 for none"
        )
    if name == "fused_attention":
        return f"`fused_attention: {_as_yaml(value)}` is not supported; use auto, sdpa or off"
    return f"`{name}: {value!r}` is not supported; use true or false"
