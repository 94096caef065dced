"""The planner's peaks against every allocation of real fused steps, without a GPU.

The steps run on the CPU with the real autograd Functions, the real engine and transformers around
them; the Triton launchers are replaced by what they allocate, because their torch references, which
a CPU would run, have temporaries of their own. So what is tested is which tensors are alive
together, not what is in them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from lorafuse import FuseConfig, fuse
from lorafuse.kernels import linear_cross_entropy, lora_linear, lora_mlp, lora_qkv, rms_norm, rope
from lorafuse.kernels.glu_adapters import GluAdapterGradients
from lorafuse.kernels.lora_linear import fold_alignment
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import base_model
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometries import Model
from lorafuse.plugin.plan_groups import Workload
from lorafuse.plugin.plan_memory import (
    _CUBLAS_BYTES,
    adapter_bytes,
    optimizer_bytes,
    weight_bytes,
)
from lorafuse.plugin.plan_model import model_shape
from lorafuse.plugin.planner import predict

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "head_dim": 64,
}
FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma2": lambda **sizes: Gemma2Config(**sizes, sliding_window=1024),
}


class Allocations(TorchDispatchMode):
    """The most bytes that storages made under it have taken at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for key in [key for key, (ref, _) in self.live.items() if ref.expired()]:
            del self.live[key]
        outputs = func(*args, **kwargs)
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor) and _key(x) not in known and _key(x) not in self.live:
                storage = x.untyped_storage()
                self.live[_key(x)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return outputs


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@contextmanager
def launchers_that_only_allocate() -> Iterator[None]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)

    def norm_fwd(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return empty(*x.shape[:-1])

    def norm_bwd(dy: Tensor, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.empty_like(x), None

    def glu_bwd(
        gate: Tensor, up: Tensor, dm: Tensor, activation: str, *factors: Tensor | None
    ) -> GluAdapterGradients:
        dA, dB_gate, dB_up = (
            None if f is None else empty(f.shape[1], gate.shape[1]) for f in factors
        )
        return GluAdapterGradients(
            dA, None if dB_gate is None else dB_gate.t(), None if dB_up is None else dB_up.t()
        )

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return empty(a.shape[0], b.shape[1])

    stand_ins = {
        lora_linear: {
            "rms_norm_fwd": norm_fwd, "dequantise": nothing, "block_diagonal": nothing,
            "stack": nothing, "mm_fp32": mm,
        },
        lora_mlp: {
            "glu_fwd": nothing, "glu_bwd_adapters_": glu_bwd, "rms_norm_bwd": norm_bwd,
        },
        lora_qkv: {"rope_qk_": nothing, "rope_copy": nothing, "rms_norm_bwd": norm_bwd},
        rms_norm: {"rms_norm_fwd": norm_fwd, "rms_norm_bwd": norm_bwd},
        rope: {"rope_copy": nothing},
        linear_cross_entropy: {"cross_entropy_rows_": nothing, "mm_fp32": mm},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module, functions in stand_ins.items():
            for name, function in functions.items():
                patch.setattr(module, name, function)
        yield


def config_of(mode: str) -> FuseConfig:
    """The flags of a mode; `checkpointing` is the trainer's own."""
    if mode == "checkpointing":
        return FuseConfig()
    try:
        return FuseConfig(fused_checkpointing=mode)
    except FuseConfigError:
        if mode == "off":
            return FuseConfig()
        pytest.skip(f"this version has no fused_checkpointing: {mode}")


def measured(
    config: PretrainedConfig, quant: str, shapes: Sequence[tuple[int, int]], mode: str
) -> list[int]:
    """By (batch, tokens), bytes at the peak of a step, beside weights and adapters."""
    flags = config_of(mode)
    job = Job("lorafuse", "small", None, quant, 8, 1, 2, 1, False, 1, "sdpa", "cpu")
    base = base_model(Model("small", config, None), job)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora).train()
    if mode == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    report = fuse(model, flags).to_dict()["operations"]
    assert report["lora_mlp"]["fused"] == 3 and report["cross_entropy"]["fused"] == 1
    peaks = []
    for shape in shapes:
        with launchers_that_only_allocate(), Allocations() as allocations:
            ids = torch.randint(3, config.vocab_size, shape)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids.clone(), use_cache=False).loss
            loss.backward()
        peaks.append(allocations.peak)
        model.zero_grad(set_to_none=True)
        del loss
    return peaks


def planned(config: PretrainedConfig, quant: Any, batch: int, tokens: int, mode: str) -> int:
    workload = Workload(
        model_shape("small", config), tokens, batch, rank=8, quant=quant,
        fold_alignment=fold_alignment(torch.device("cpu")),
    )  # fmt: skip
    at_rest = weight_bytes(workload) + adapter_bytes(workload) + optimizer_bytes(workload)
    return predict(workload, mode).peak_bytes - at_rest - _CUBLAS_BYTES


# A small vocabulary has the peak in an MLP's backward, a large one at the loss.
@pytest.mark.parametrize(
    ("family", "quant", "words"),
    [
        ("llama", "nf4", 128),
        ("llama", "none", 128),
        ("llama", "nf4", 8000),
        ("qwen3", "nf4", 128),
        ("gemma2", "nf4", 128),
    ],
)
@pytest.mark.parametrize("mode", ["off", "selective", "checkpointing"])
def test_a_real_step_allocates_what_is_planned(
    family: str, quant: str, mode: str, words: int
) -> None:
    pytest.importorskip("bitsandbytes")
    config = FAMILIES[family](**SIZES, vocab_size=words)
    shapes = ((2, 96), (1, 512))
    for (batch, tokens), real in zip(shapes, measured(config, quant, shapes, mode), strict=True):
        found = planned(config, quant, batch, tokens, mode)
        assert found == pytest.approx(real, rel=0.01), (batch, tokens, found / real - 1)
