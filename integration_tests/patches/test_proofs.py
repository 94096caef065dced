"""A proof is made once for each distinct block, and leaves no trace, whatever becomes of it."""

import gc
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    SmolLM3Config,
)
from transformers.models.llama import modeling_llama as llama

from lorafuse.patches import apply as engine
from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.probe import (
    FEW_WORDS,
    _without_weights,
    last_position,
    record_far_calls,
    record_layer_calls,
)
from lorafuse.plugin.fuse import fuse
from lorafuse.plugin.tiny_config import tiny_config

ALL = dict.fromkeys(OPERATIONS, True)
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
LAYERS = 6
# The final norm is one of each, and so are the kinds of layers.
DISTINCT: dict[str, tuple[Callable[[], PretrainedConfig], int]] = {
    "all alike": (lambda: LlamaConfig(**SIZES, num_hidden_layers=LAYERS), 1),
    "sliding and full in turn": (
        lambda: Gemma2Config(**SIZES, num_hidden_layers=LAYERS, head_dim=16, sliding_window=8),
        2,
    ),
    "every third full": (
        lambda: Gemma3TextConfig(
            **SIZES, num_hidden_layers=LAYERS, head_dim=16, sliding_window=8,
            sliding_window_pattern=3,
        ),
        2,
    ),
    "every other without RoPE": (
        lambda: SmolLM3Config(**SIZES, num_hidden_layers=LAYERS, no_rope_layers=[1, 0] * 3),
        2,
    ),
}  # fmt: skip


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of each block that is proven."""
    proven: list[str] = []
    real = engine.verify
    monkeypatch.setattr(
        engine,
        "verify",
        lambda block, *a, **k: proven.append(type(block).__name__) or real(block, *a, **k),
    )
    return proven


@pytest.mark.parametrize("name", DISTINCT)
def test_each_distinct_block_is_proven_once(name, make_peft, proofs) -> None:
    config, kinds = DISTINCT[name]
    model = make_peft(config(), attention="eager")
    for again in (1, 2):  # fusing again proves again, and no more than at first
        fused = apply(model, ALL)
        whole = [r for r in fused.records if r.operation == "lora_mlp" and r.level == "layer"]
        assert len(whole) == LAYERS, fused.notes
        layers = [p for p in proofs if "DecoderLayer" in p]
        # A layer without RoPE is tried with each pairing of features first.
        tries = 1 if "RoPE" not in name else 4
        assert len(layers) == again * (kinds - 1 + tries), proofs
        assert len(proofs) == again * (kinds + tries), proofs
        assert fused.proofs * again == len(proofs)
        fused.unfuse()


def test_parts_are_proven_once(make_peft, proofs) -> None:
    model = make_peft(LlamaConfig(**SIZES, num_hidden_layers=LAYERS))
    apply(model, ALL | {"rope": False})
    # q/k/v and o of the attention, the MLP, and one norm for all
    assert sorted(proofs) == ["LlamaAttention", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"]


def test_the_report_says_what_verification_took(make_peft) -> None:
    report = fuse(make_peft(LlamaConfig(**SIZES, num_hidden_layers=2)))
    said = report.to_dict()["verification"]
    assert said["blocks"] == 2 and 0 < said["seconds"] < 60
    assert "verification: 2 distinct blocks compared with stock in" in report.text()


def layers_that_share_weights(make_peft: Any, count: int, **sizes: int) -> Any:
    """A Llama in NF4 of `count` layers, the weights of which are one layer's."""
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=1, pad_token_id=0, **sizes)
    model = make_peft(config, torch.bfloat16, nf4=True, r=32)
    backbone = model.get_base_model().model
    backbone.config.num_hidden_layers = count  # the forward runs as many
    first = backbone.layers[0]
    shared = {id(p): p for p in first.parameters()}
    backbone.layers = nn.ModuleList(
        [first, *(deepcopy(first, dict(shared)) for _ in range(count - 1))]
    )
    for index, layer in enumerate(backbone.layers):
        layer.self_attn.layer_idx = index
    return model


def test_layers_that_are_alike_are_proven_once(make_peft) -> None:
    model = layers_that_share_weights(
        make_peft, 4, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    assert apply(model, ALL).proofs == 2  # the layer, and the norm behind the last


@pytest.mark.gpu
def test_verifying_an_8b_geometry_takes_less_than_5_seconds(make_peft) -> None:
    """32 layers of Llama-3.1-8B's sizes, NF4, on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = layers_that_share_weights(
        make_peft, 32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    apply(model, ALL).unfuse()  # Triton compiles; its cache outlives the process
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    fused = apply(model, ALL)
    print(f"verified in {fused.proving_s:.2f} s")
    assert fused.proofs == 2 and fused.proving_s < 5, (fused.proofs, fused.proving_s)
    fused.unfuse()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 1e6


def raw(tensor: torch.Tensor) -> bytes:
    """Packed weights that are stored as bfloat16 hold NaNs, which equal nothing."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def hooks(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {k: tuple(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that fusing might leave behind. Of a module: what it holds, and by which names."""
    modules = dict(model.named_modules())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": raw(torch.get_rng_state()),
        "cuda": [raw(state) for state in cuda],
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "state_dict": {k: raw(v) for k, v in model.state_dict().items()},
        # not their versions: transformers 5.24 writes RoPE's frequencies in place, as they are
        "buffers": {n: (id(b), raw(b)) for n, b in model.named_buffers()},
        "parameters": {
            n: (id(p), p.data_ptr(), p._version, p.requires_grad)
            for n, p in model.named_parameters()
        },
        "gradients": {n: raw(p.grad) for n, p in model.named_parameters() if p.grad is not None},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {n: hooks(m) for n, m in modules.items()},
        "keys": {n: sorted(m.__dict__) for n, m in modules.items()},
        "classes": {n: type(m) for n, m in modules.items()},
        "plain": {
            n: {k: v for k, v in m.__dict__.items() if isinstance(v, int | float | str)}
            for n, m in modules.items()
        },
        "config": model.config.to_dict(),
        "grad mode": torch.is_grad_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }  # fmt: skip


class ShortTable(llama.LlamaModel):
    """Positions beyond a table: an exception on the CPU, the end of the process on a GPU."""

    seen: ClassVar[list[tuple[bool, int]]] = []

    def forward(self, *args, position_ids=None, **kwargs):
        if position_ids is not None:
            self.seen.append((id(self) == self.live, int(position_ids.max())))
            self.table[position_ids]
        return super().forward(*args, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("rows", [16, 256])
def test_far_positions_are_tried_on_a_copy(rows, make_peft, step, close) -> None:
    model = make_peft(LlamaConfig(**SIZES, num_hidden_layers=2))
    backbone = model.get_base_model().model
    backbone.__class__ = ShortTable
    backbone.register_buffer("table", torch.zeros(rows), persistent=False)
    backbone.live = id(backbone)  # a copy has another
    ShortTable.seen.clear()
    stock = step(model)
    fused = apply(model, ALL)
    assert (False, 255) in ShortTable.seen
    assert max(last for live, last in ShortTable.seen if live) < 12
    close(step(model), stock)
    assert sum(r.level == "layer" for r in fused.records if r.operation == "rope") == 2


@pytest.mark.parametrize("model_type", ["gemma3", "mllama"])
def test_far_positions_behind_a_vision_tower_with_tables_of_its_own(model_type) -> None:
    """The first table in these is the tower's, as wide as an image: it is not one of words."""
    config = tiny_config(model_type, images=True)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    backbone, words = model.model, model.get_input_embeddings()
    assert next(m for m in backbone.modules() if isinstance(m, nn.Embedding)) is not words
    layers = [m for m in backbone.language_model.modules() if hasattr(m, "mlp")]
    replica, _ = _without_weights(backbone, layers)
    table = replica.get_input_embeddings()
    assert table.num_embeddings == FEW_WORDS and not torch.equal(table.weight, words.weight)
    near = record_layer_calls(backbone, layers)
    far = record_far_calls(backbone, layers, last_position(backbone))
    assert near and set(far) == set(near)


class Raises(llama.LlamaMLP):
    """Its stock form works in a model, and fails in a proof."""

    def forward(self, x):
        if x.shape[0] * x.shape[1] == 24:
            torch.randn(7), random.random(), np.random.rand(), self.__dict__.__setitem__("left", 1)
            raise RuntimeError("not with 24 tokens")
        return super().forward(x)


class Wrong(llama.LlamaMLP):
    def forward(self, x):
        return 0.9 * super().forward(x)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8, "original_max_position_embeddings": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_hidden_layers=2),
    "dynamic": lambda: LlamaConfig(**SIZES, num_hidden_layers=2, rope_parameters=DYNAMIC),
    "longrope": lambda: Phi3Config(
        **SIZES, num_hidden_layers=2, rope_parameters=LONGROPE, original_max_position_embeddings=64
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, num_hidden_layers=2, head_dim=16, sliding_window=8, sliding_window_pattern=2
    ),
}


CASES = [*((name, None) for name in MODELS), ("llama", Raises), ("llama", Wrong)]


@pytest.mark.parametrize("nf4", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize(("name", "mlp"), CASES, ids=lambda c: getattr(c, "__name__", c))
def test_fusing_and_unfusing_leaves_no_trace(name, nf4, mlp, make_peft, step) -> None:
    model = make_peft(MODELS[name](), nf4=nf4)
    for layer in model.get_base_model().model.layers if mlp else ():
        layer.mlp.__class__ = mlp
    step(model)  # transformers and bitsandbytes mark a module that they have run
    model.get_base_model().model.layers[0].eval()
    model.get_base_model().model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    trained = next(p for p in model.parameters() if p.requires_grad)
    trained.grad = torch.ones_like(trained)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = snapshot(model)
    fused = apply(model, ALL)
    assert any(r.fused for r in fused.records)
    while_fused = snapshot(model)
    fused.unfuse()
    after = snapshot(model)
    for part, found in before.items():
        assert after[part] == found, part
        if part != "keys":  # `forward` stands on what is fused
            assert while_fused[part] == found, part


def test_a_proof_that_fails_takes_nothing_with_it(make_peft, step, close, monkeypatch) -> None:
    """Not even an error that no one expects leaves a model half fused."""
    model = make_peft(MODELS["llama"]())
    stock = step(model)
    before = snapshot(model)
    real, calls = engine.verify, []

    def broken(*args: Any, **kwargs: Any) -> str | None:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("in the second proof")
        return real(*args, **kwargs)

    monkeypatch.setattr(engine, "verify", broken)
    with pytest.raises(MemoryError, match="second proof"):
        apply(model, ALL)
    assert {k for k, v in snapshot(model).items() if v != before[k]} == set()
    monkeypatch.setattr(engine, "verify", real)
    fused = apply(model, ALL)
    close(step(model), stock)
    assert all(r.fused for r in fused.records)


def test_a_proof_keeps_no_memory(make_peft) -> None:
    model = make_peft(MODELS["llama"]())
    apply(model, ALL).unfuse()
    gc.collect()

    def tensors() -> int:
        return sum(o.numel() for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))

    before = tensors()
    fused = apply(model, ALL)
    fused.unfuse()
    del fused
    gc.collect()
    assert tensors() <= before
