"""Layers replayed as graphs: the steps of plain runs, to the last bit.

On a GPU these are CUDA graphs; on a CPU `graph_emulation` stands in for them.
"""

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from graph_emulation import EmulatedRecorder
from peft import LoraConfig

from lorafuse.patches import apply as apply_module
from lorafuse.patches import layer_graphs
from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.host_memory import pinned_buffer
from lorafuse.patches.layer_graphs import MOST, OPERATION, WARM, CudaRecorder
from lorafuse.patches.modes import OFF, SELECTIVE

ALL = dict.fromkeys(OPERATIONS, True)
# Biases, norms on heads, norms behind the blocks, one projection for q/k/v, layers without RoPE,
# scaled blocks.
CASES = [
    ("llama", True),
    ("llama-biased", False),
    ("qwen3", False),
    ("gemma2", False),
    ("phi3", True),
    ("smollm3", False),
    ("granite", False),
]


@pytest.fixture(autouse=True)
def recorder(device, monkeypatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(layer_graphs, "CudaRecorder", EmulatedRecorder)
        monkeypatch.setattr(apply_module, "why_no_graphs", lambda device: None)


@pytest.fixture
def step(step):
    """As trainers call a model: without a KV cache."""
    return partial(step, use_cache=False)


@pytest.fixture
def equal(device):
    """The same bits on the CPU; on a GPU attention's backward is not the same from run to run."""

    def check(ours: dict[str, Any], exact: dict[str, Any]) -> None:
        assert set(ours) == set(exact)
        for name, expected in exact.items():
            if device.type == "cpu":
                assert torch.equal(ours[name], expected), name
            else:
                error = (ours[name].double() - expected.double()).norm()
                assert error <= 1e-2 * expected.double().norm().clamp_min(1e-12), name

    return check


def fused(model: Any, graphs: bool, **settings: Any) -> Any:
    return apply(
        model, ALL, checkpointing=settings.pop("checkpointing", OFF), graphs=graphs, **settings
    )


def graphs_of(result: Any) -> layer_graphs.LayerGraphs:
    return next(r.graphs for r in result.records if r.operation == OPERATION)


def warm(model: Any, step: Any) -> None:
    for _ in range(WARM):
        step(model)


@pytest.mark.parametrize(("family", "nf4"), CASES)
def test_the_same_steps(family, nf4, make_peft, step, tokens, equal) -> None:
    """Replayed steps of other tokens and other adapters than those that were recorded."""
    model = make_peft(family, torch.bfloat16, nf4=nf4)
    results = {}
    for graphs in (False, True):
        this = copy.deepcopy(model)
        result = fused(this, graphs)
        warm(this, step)
        first = step(this)
        trained = [p for n, p in this.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.mul_(1.5)
        tokens.copy_(tokens.flip(1))
        results[graphs] = first, step(this), step(this)
        tokens.copy_(tokens.flip(1))
        if graphs:
            own = graphs_of(result)
            assert own.replays == 3 * len(own.layers), own.reasons
            assert sum(own.reasons.values()) == WARM * len(own.layers)
    for ours, plain in zip(results[True], results[False], strict=True):
        equal(ours, plain)


def test_gradients_add_up_over_micro_batches(make_peft, step, tokens, equal) -> None:
    model = make_peft("llama")
    results = []
    for graphs in (False, True):
        this = copy.deepcopy(model)
        fused(this, graphs)
        warm(this, step)
        for micro_batch in (tokens, tokens.flip(1), tokens.flip(0)):
            this(input_ids=micro_batch, labels=micro_batch, use_cache=False).loss.backward()
        results.append({n: p.grad for n, p in this.named_parameters() if p.grad is not None})
    equal(results[1], results[0])


def test_what_a_hook_keeps_is_not_overwritten(make_peft, step, tokens) -> None:
    model = make_peft("llama")
    fused(model, True)
    warm(model, step)
    kept: list[torch.Tensor] = []
    parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
    parameter.register_hook(kept.append)
    step(model)
    before = kept[0].clone()
    model(input_ids=tokens.flip(1), labels=tokens, use_cache=False).loss.backward()
    assert torch.equal(kept[0], before) and not torch.equal(kept[1], before)


def test_two_forwards_before_a_backward(make_peft, step, tokens, equal) -> None:
    """The second runs as ever: the first one's activations are still needed."""
    model = make_peft("llama")
    results = []
    for graphs in (False, True):
        this = copy.deepcopy(model)
        result = fused(this, graphs)
        warm(this, step)
        loss = this(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss = loss + 2 * this(input_ids=tokens.flip(1), labels=tokens, use_cache=False).loss
        loss.backward()
        results.append({n: p.grad for n, p in this.named_parameters() if p.grad is not None})
        if graphs:
            assert graphs_of(result).replays == 2
            assert any("still waits" in why for why in graphs_of(result).reasons)
    equal(results[1], results[0])


def test_a_loss_that_is_dropped_does_not_block_the_next(make_peft, step, tokens) -> None:
    model = make_peft("llama")
    graphs = graphs_of(fused(model, True))
    warm(model, step)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    del loss
    step(model)
    assert graphs.replays == 4


def test_a_second_backward_is_refused(make_peft, step, tokens) -> None:
    model = make_peft("llama")
    fused(model, True)
    warm(model, step)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_backward_after_another_forwards_is_refused(make_peft, step, tokens) -> None:
    model = make_peft("llama")
    fused(model, True)
    warm(model, step)
    old = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    old.backward(retain_graph=True)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    with pytest.raises(RuntimeError, match="after another forward"):
        old.backward()


def test_masks_and_documents_stay_outside(make_peft, step, tokens, equal) -> None:
    """A graph that was recorded without a mask serves batches with one, and packed documents."""
    model = make_peft("llama")
    mask = torch.ones_like(tokens)
    mask[0, 12:] = 0
    packed = torch.cat([torch.arange(12), torch.arange(8)]).repeat(2, 1).to(tokens.device)
    plain = {"position_ids": torch.arange(20).repeat(2, 1).to(tokens.device)}
    calls: list[dict[str, Any]] = [
        plain | {"attention_mask": mask},
        {"position_ids": packed},
        plain,
    ]
    results = []
    for graphs in (False, True):
        this = copy.deepcopy(model)
        result = fused(this, graphs)
        warm(this, partial(step, **plain))
        results.append([step(this, **call) for call in calls])
        if graphs:
            assert graphs_of(result).replays == 2 * 3, graphs_of(result).reasons
    for ours, plain in zip(results[1], results[0], strict=True):
        equal(ours, plain)


def test_shapes_that_come_and_go(make_peft, step, tokens, equal) -> None:
    model = make_peft("llama")
    plain = copy.deepcopy(model)
    fused(plain, False)
    graphs = graphs_of(fused(model, True))
    for length in (20, 12, 20, 8, 16):
        for _ in range(WARM + 2):
            ids = tokens[:, :length]
            results = []
            for one in (model, plain):
                one.zero_grad()
                one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                results.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
            equal(*results)
    assert graphs._sets == MOST
    assert f"{MOST} shapes have been recorded: no more are" in graphs.reasons


def test_adapters_that_change(make_peft, step, equal) -> None:
    """Another adapter, another scaling, none: as ever, and right; then replayed again."""
    model = make_peft("llama")
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "other" in name and "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    results = []
    for graphs in (False, True):
        this = copy.deepcopy(model)
        result = fused(this, graphs)
        warm(this, step)
        found = [step(this)]
        this.set_adapter("other")
        found.append(step(this))
        this.set_adapter("default")
        found.append(step(this))
        results.append(found)
        if graphs:
            assert graphs_of(result).replays == 4
            assert any("adapters or weights" in why for why in graphs_of(result).reasons)
    for ours, plain in zip(results[1], results[0], strict=True):
        equal(ours, plain)


@pytest.mark.parametrize("layers", [[0], [1]])
def test_layers_without_adapters(layers, make_peft, step, equal) -> None:
    results = []
    for graphs in (False, True):
        model = make_peft(
            "llama", layers_to_transform=layers, target_modules=["q_proj", "o_proj", "down_proj"]
        )
        result = fused(model, graphs)
        warm(model, step)
        results.append([step(model), step(model)])
        if graphs:
            assert graphs_of(result).replays == 4
    for ours, plain in zip(results[1], results[0], strict=True):
        equal(ours, plain)


def test_an_input_that_needs_a_gradient(make_peft, step, equal) -> None:
    """Trained embeddings, or `enable_input_require_grads`."""
    results = []
    for graphs in (False, True):
        model = make_peft("llama", modules_to_save=["embed_tokens"])
        fused(model, graphs)
        warm(model, step)
        results.append([step(model), step(model)])
    assert any("embed_tokens" in name for name in results[0][0])
    for ours, plain in zip(results[1], results[0], strict=True):
        equal(ours, plain)


def test_what_is_not_recorded(make_peft, step, tokens) -> None:
    dropping = make_peft("llama", lora_dropout=0.5)
    graphs = graphs_of(fused(dropping, True))
    warm(dropping, step)
    step(dropping)
    assert graphs.replays == 0 and any("drops out" in why for why in graphs.reasons)
    model = make_peft("llama")
    result = fused(model, True, checkpointing=SELECTIVE)
    warm(model, step)
    step(model)
    assert graphs_of(result).replays == 0
    assert any("fused_checkpointing" in why for why in graphs_of(result).reasons)
    parts = make_peft("glm4", target_modules=["q_proj", "k_proj", "v_proj"])
    records = [r for r in fused(parts, True).records if r.operation == OPERATION]
    if not records[0].fused:
        assert records[0].reason == "not every decoder layer is fused whole"


def test_evaluation_generation_and_hidden_states(make_peft, step, tokens) -> None:
    model = make_peft("llama")
    graphs = graphs_of(fused(model, True))
    warm(model, step)
    step(model)
    with torch.no_grad():
        model.eval()
        model(input_ids=tokens)
        model.generate(input_ids=tokens[:1, :4], max_new_tokens=2, do_sample=False)
        model.train()
    assert graphs.replays == 2
    out = model(input_ids=tokens, labels=tokens, use_cache=False, output_hidden_states=True)
    kept = [h.clone() for h in out.hidden_states]
    step(model)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, kept, strict=True))
    assert any("hidden states" in why for why in graphs.reasons)


def test_a_copy_records_its_own_and_unfuse_lets_go(make_peft, step, equal) -> None:
    model = make_peft("llama")
    result = fused(model, True)
    warm(model, step)
    expected = step(model)
    other = copy.deepcopy(model)
    warm(other, step)
    equal(step(other), expected)
    theirs = other.get_base_model().model.layers[0].forward.graphs
    assert theirs is not graphs_of(result) and theirs.replays == 2
    kept = [weakref.ref(tensor) for tensor in graphs_of(result)._keeps]
    assert kept
    result.unfuse()
    assert not any(tensor() is not None for tensor in kept)
    assert "forward" not in model.get_base_model().model.layers[0].__dict__


def test_a_recording_that_fails_leaves_the_plain_way(make_peft, step, equal, monkeypatch) -> None:
    class Failing:
        def __init__(self, device: torch.device) -> None:
            pass

        def record(self, run: Any) -> Any:
            run()
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def alias(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    model = make_peft("llama")
    plain = copy.deepcopy(model)
    fused(plain, False)
    graphs = graphs_of(fused(model, True))
    graphs.recorder = Failing
    for _ in range(WARM + 2):
        equal(step(model), step(plain))
    assert graphs.replays == 0
    assert any("recording failed: operation not permitted" in why for why in graphs.reasons)


def positions_of_its_own(rotary: Any, module: Any, args: Any, kwargs: Any) -> Any:
    """A forward pre-hook: the layer turns by twice the angles."""
    return args, kwargs | {"position_embeddings": rotary(args[0], 2 * kwargs["position_ids"])}


def test_layers_that_no_longer_share_their_positions(make_peft, tokens, equal) -> None:
    """They were recorded with one cos and sin; with one of its own, a layer runs as ever."""
    results = []
    for graphs in (False, True):
        model = make_peft("llama")
        result = fused(model, graphs)
        backbone = model.get_base_model().model
        found = []
        for step in range(WARM + 2):
            if step == WARM + 1:
                hook = partial(positions_of_its_own, backbone.rotary_emb)
                backbone.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
            model.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        results.append(found)
        if graphs:
            assert graphs_of(result).replays == 2 + 1, graphs_of(result).reasons
    for ours, plain in zip(results[1], results[0], strict=True):
        equal(ours, plain)
    assert not torch.equal(*(found[name] for found in results[0][-2:] for name in list(found)[:1]))


class Cycle:
    """Garbage that only a collection finds; `told` hears of it."""

    def __init__(self, told: list[str]) -> None:
        self.own = self
        weakref.finalize(self, told.append, "collected")


@contextmanager
def collecting_often() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.set_threshold(10, 2, 2)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def test_no_garbage_is_collected_while_a_stream_is_recorded(make_peft, step, monkeypatch) -> None:
    """A pinned buffer among it goes back to the driver, which breaks off the recording."""
    model = make_peft("llama")
    result = fused(model, True)
    collected: list[str] = []
    within: list[tuple[bool, int]] = []
    run = layer_graphs._Recording.run

    def watched(self: Any) -> Any:
        within.append((gc.isenabled(), len(collected)))
        Cycle(collected)
        recorded = run(self)
        within.append((gc.isenabled(), len(collected)))
        return recorded

    monkeypatch.setattr(layer_graphs._Recording, "run", watched)
    Cycle(collected)
    with collecting_often():
        for _ in range(WARM + 1):
            step(model)
    assert within == [(False, 1), (False, 1)]
    assert gc.isenabled()
    assert graphs_of(result).replays


@pytest.mark.gpu
def test_what_earlier_runs_have_pinned_does_not_break_it_off(
    make_peft, step, device, monkeypatch
) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    run = layer_graphs._Recording.run

    def with_garbage(self: Any) -> Any:
        buffer, pinned = pinned_buffer(2**20)
        assert pinned
        cycle: list[Any] = [buffer]
        cycle.append(cycle)
        return run(self)

    monkeypatch.setattr(layer_graphs._Recording, "run", with_garbage)
    model = make_peft("llama", torch.bfloat16)
    result = fused(model, True)
    with collecting_often():
        for _ in range(WARM + 1):
            step(model)
    assert graphs_of(result).replays, graphs_of(result).reasons


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_the_generator_as_it_was(device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(3)
    expected = torch.randn(5, device=device)
    torch.manual_seed(3)
    recorder = CudaRecorder(device)
    held = recorder.record(lambda: [torch.ones(4, device=device)])  # else the pool is gone with it
    with pytest.raises(RuntimeError, match="captur"):
        recorder.record(torch.cuda.synchronize)
    assert torch.equal(torch.randn(5, device=device), expected)
    replay, _ = CudaRecorder(device).record(lambda: [torch.ones(4, device=device)])
    replay()
    held[0]()
