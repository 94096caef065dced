"""The planner's peaks against every allocation of real fused steps, without a GPU.

The steps run on the CPU with the real autograd Functions, the real engine and transformers around
them; the Triton launchers are replaced by what they allocate, because their torch references, which
a CPU would run, have temporaries of their own. So what is tested is which tensors are alive
together, not what is in them.

`offload` copies nothing on a CPU. Here the real `Offloader` is told that it is on a GPU, with
streams and events that do nothing and a host whose memory is not counted: which tensors it lets go
of when, and when their copies come back, is its own code. That the copies are done in time, and
what the caching allocator makes of a second stream, only a GPU can show
(`integration_tests/gpu/memory_points.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from lorafuse import FuseConfig, fuse
from lorafuse.kernels import linear_cross_entropy, lora_linear, lora_mlp, lora_qkv, rms_norm, rope
from lorafuse.kernels.glu_adapters import GluAdapterGradients
from lorafuse.kernels.lora_linear import fold_alignment
from lorafuse.patches import checkpointing, offload, recomputation
from lorafuse.patches.modes import MODES, OFF, OFFLOAD, SELECTIVE, TILE_ROWS
from lorafuse.plugin import plan_memory
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import base_model
from lorafuse.plugin.geometries import Model
from lorafuse.plugin.plan_groups import Workload
from lorafuse.plugin.plan_memory import (
    _CUBLAS_BYTES,
    Step,
    adapter_bytes,
    optimizer_bytes,
    weight_bytes,
)
from lorafuse.plugin.plan_model import model_shape

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "head_dim": 64,
}
FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma2": lambda **sizes: Gemma2Config(**sizes, sliding_window=1024),
    "granite": lambda **sizes: GraniteConfig(
        **{k: v for k, v in sizes.items() if k != "head_dim"}, residual_multiplier=0.22
    ),
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

    def norm_bwd(
        dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, around: Tensor | None,
        need_dweight: bool, out: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        return torch.empty_like(x) if out is None else out, None

    def glu_bwd(
        gate: Tensor, up: Tensor, dm: Tensor, activation: str, *factors: Tensor | None
    ) -> GluAdapterGradients:
        G, *of_x = factors
        dA = None if G is None else empty(G.shape[1], gate.shape[1])
        dBs = [None if f is None else empty(gate.shape[1], f.shape[1]) for f in of_x]
        return GluAdapterGradients(dA, *dBs)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return empty(a.shape[0], b.shape[1])

    stand_ins = {
        lora_linear: {
            "rms_norm_fwd": norm_fwd, "dequantise": nothing, "dequantise_rows": nothing,
            "write_adapters": nothing, "weigh_": lambda x, *_: x, "mm_fp32": mm,
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


class NoStream:
    """A stream, and its events."""

    def record_event(self) -> "NoStream":
        return self

    def wait_event(self, event: "NoStream") -> None:
        pass


class Host(offload._Pool):
    """Buffers that torch's dispatcher does not see made."""

    made_bytes = 0

    def get(self, nbytes: int) -> Tensor:
        self.made_bytes += nbytes
        return torch.from_numpy(np.empty(nbytes, np.uint8))


class OffloaderAsOnGpu(offload.Offloader):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.on_gpu, self.stream, self.pool = True, NoStream(), Host()


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's attention has its temporaries within the kernel."""
    monkeypatch.setattr(plan_memory, "attention_workspace", lambda *_: 0)


@pytest.fixture(autouse=True)
def offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and also what is smaller than 8 MiB."""
    monkeypatch.setattr(checkpointing, "Offloader", OffloaderAsOnGpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: NoStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: nullcontext())
    monkeypatch.setattr(recomputation, "SMALL_BYTES", 2**14)


def measured(
    config: PretrainedConfig,
    quant: str,
    shapes: Sequence[tuple[int, int]],
    modes: Sequence[str],
    prepare_kbit: bool = False,
) -> list[tuple[int, int]]:
    """By (batch, tokens), bytes at the peak of a step, beside weights and adapters; on the host."""
    job = Job("lorafuse", "small", None, quant, 8, 1, 2, 1, False, 1, "sdpa", "cpu")
    base = base_model(Model("small", config, None), job)
    if prepare_kbit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora).train()
    fused = fuse(model, FuseConfig(fused_checkpointing="selective"))
    report = fused.to_dict()["operations"]
    layers = config.num_hidden_layers
    assert report["lora_mlp"]["fused"] == layers and report["cross_entropy"]["fused"] == 1
    engine = fused.checkpointing
    engine.begin = lambda _: setattr(engine, "modes", list(modes))
    peaks = []
    for shape in shapes:
        engine._offloader = None
        with launchers_that_only_allocate(), Allocations() as allocations:
            ids = torch.randint(3, config.vocab_size, shape)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids.clone(), use_cache=False).loss
            loss.backward()
        host = 0 if engine._offloader is None else engine._offloader.pool.made_bytes
        peaks.append((allocations.peak, host))
        model.zero_grad(set_to_none=True)
        del loss
    return peaks


def planned(
    config: PretrainedConfig,
    quant: Any,
    batch: int,
    tokens: int,
    modes: Sequence[str],
    prepare_kbit: bool = False,
) -> tuple[int, int]:
    workload = Workload(
        model_shape("small", config), tokens, batch, rank=8, quant=quant,
        fold_alignment=fold_alignment(torch.device("cpu")), prepare_kbit=prepare_kbit,
    )  # fmt: skip
    at_rest = weight_bytes(workload) + adapter_bytes(workload) + optimizer_bytes(workload)
    memory = Step(workload, modes).run()
    return memory.peak_bytes - at_rest - _CUBLAS_BYTES, memory.host_bytes


SHAPES = ((2, 96), (1, 512))


def check(
    family: str, quant: str, words: int, modes: Sequence[str], layers: int, prepare: bool = False
) -> None:
    pytest.importorskip("bitsandbytes")
    config = FAMILIES[family](**SIZES, vocab_size=words, num_hidden_layers=layers)
    if model_shape("small", config).eager:
        pytest.skip("eager attention is not predicted, and the plan says so")
    for (batch, tokens), (real, host) in zip(
        SHAPES, measured(config, quant, SHAPES, modes, prepare), strict=True
    ):
        found, found_host = planned(config, quant, batch, tokens, modes, prepare)
        assert found == pytest.approx(real, rel=0.01), (batch, tokens, found / real - 1)
        assert found_host == host


# A small vocabulary has the peak in an MLP's backward, a large one at the loss.
@pytest.mark.parametrize(
    ("family", "quant", "words"),
    [
        ("llama", "nf4", 128),
        ("llama", "none", 128),
        ("llama", "nf4", 8000),
        ("qwen3", "nf4", 128),
        ("gemma2", "nf4", 128),
        ("granite", "nf4", 128),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_real_step_allocates_what_is_planned(
    family: str, quant: str, mode: str, words: int
) -> None:
    check(family, quant, words, [mode] * 5, 5)


@pytest.mark.parametrize(
    ("family", "words"),
    [("llama", 128), ("llama", 8000), ("qwen3", 128), ("gemma2", 128), ("granite", 128)],
)
@pytest.mark.parametrize("mode", MODES)
def test_with_the_rest_in_fp32(family: str, mode: str, words: int) -> None:
    check(family, "nf4", words, [mode] * 5, 5, prepare=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_an_mlp_in_tiles(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE_ROWS, SELECTIVE, 130)
    monkeypatch.setitem(TILE_ROWS, OFFLOAD, 60)
    check(family, "nf4", 128, [mode] * 5, 5)


@pytest.mark.parametrize(
    "modes",
    [
        [SELECTIVE] * 2 + [OFF] * 3,
        [OFFLOAD] * 3 + [SELECTIVE] * 3,
        [OFFLOAD] + [SELECTIVE] * 3,
    ],
    ids=lambda modes: ",".join(modes),
)
def test_layers_in_two_modes(modes: list[str]) -> None:
    check("llama", "nf4", 128, modes, len(modes))
