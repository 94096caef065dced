"""Each mode trains as `off` does, and keeps what it says."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from lorafuse.kernels import lora_mlp
from lorafuse.kernels.lora_linear import fold_alignment
from lorafuse.patches import checkpointing, offload, recomputation
from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.decoder_layer import FusedDecoderLayer
from lorafuse.patches.mlp import MlpReader
from lorafuse.patches.modes import AUTO, MODES, OFF, OFFLOAD, SELECTIVE, TILE_ROWS
from lorafuse.patches.spilling import Rates

from .conftest import FAMILIES as FAMILY_CONFIGS
from .conftest import HEAD, SMALL

ALL = dict.fromkeys(OPERATIONS, True)
FAMILIES = ["llama", "llama-biased", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "phi3",
            "granite"]  # fmt: skip


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a tiny model's activations go to the host."""
    monkeypatch.setattr(recomputation, "SMALL_BYTES", 1)


def equal(ours, stock) -> None:
    assert set(ours) == set(stock)
    for name, expected in stock.items():
        assert torch.equal(ours[name], expected), name


def modes_of(fused) -> list[str]:
    return [r.level for r in fused.records if r.operation == checkpointing.OPERATION]


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
@pytest.mark.parametrize("nf4", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_off(family, nf4, mode, make_peft, step) -> None:
    model = make_peft(family, torch.bfloat16, nf4=nf4)
    fused = apply(model, ALL, checkpointing=OFF)
    off = step(model)
    fused.unfuse()
    fused = apply(model, ALL, checkpointing=mode)
    ours = [step(model) for _ in range(2)]
    assert modes_of(fused) == [mode] * 2
    for one in ours:
        equal(one, off)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_computed_again(family, make_peft, step, monkeypatch) -> None:
    """As where the host has no room for attention's output: of the first layer here."""
    model = make_peft(family, torch.bfloat16)
    fused = apply(model, ALL, checkpointing=OFF)
    off = step(model, use_cache=False)
    fused.unfuse()
    fused = apply(model, ALL, checkpointing=OFFLOAD)
    monkeypatch.setattr(
        checkpointing.Checkpointing,
        "begin",
        lambda owner, h: owner.__dict__.update(modes=[OFFLOAD] * 2, attention_again=1),
    )
    for _ in range(2):
        equal(step(model, use_cache=False), off)
    assert modes_of(fused) == ["offload, attention computed again", OFFLOAD]


def planned(monkeypatch: pytest.MonkeyPatch, modes: list[str], spilled: list[bool]) -> None:
    """As on a GPU whose link has time for these layers' gate/up."""
    monkeypatch.setattr(
        checkpointing.Checkpointing,
        "begin",
        lambda owner, h: owner.__dict__.update(last_tape=None, modes=modes, spilled=spilled),
    )


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
@pytest.mark.parametrize("nf4", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_up_that_waits_on_the_host(family, nf4, mode, make_peft, step, monkeypatch) -> None:
    model = make_peft(family, torch.bfloat16, nf4=nf4)
    fused = apply(model, ALL, checkpointing=OFF)
    off = step(model)
    fused.unfuse()
    fused = apply(model, ALL, checkpointing=mode)
    planned(monkeypatch, [mode] * 2, [True, True])
    with monkeypatch.context() as patch:
        patch.setattr(lora_mlp, "_recompute_gate_up", None)  # it is not computed again
        for _ in range(2):
            equal(step(model), off)
    assert modes_of(fused) == [f"{mode}, gate/up on the host"] * 2
    planned(monkeypatch, [mode, OFF], [True, False])
    equal(step(model), off)
    assert modes_of(fused) == [f"{mode}, gate/up on the host", OFF]


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_gate_up_on_the_host_and_a_second_backward(mode, make_peft, tokens, monkeypatch) -> None:
    """Its memory holds its own gradient after the first: it is computed again for the second."""
    model = make_peft("llama", lora_dropout=0.2)
    results = []
    for spilled in (False, True):
        fused = apply(model, ALL, checkpointing=mode)
        with monkeypatch.context() as patch:
            planned(patch, [mode] * 2, [spilled] * 2)
            torch.manual_seed(3)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward(retain_graph=True)
            loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
        fused.unfuse()
    equal(results[1], results[0])


def test_only_gate_up_leaves_where_the_rest_may_stay(make_peft, step, monkeypatch) -> None:
    model = make_peft("gemma2")  # norms behind the blocks keep their inputs
    fused = apply(model, ALL, checkpointing=SELECTIVE)
    planned(monkeypatch, [SELECTIVE] * 2, [True, False])
    taken: list[tuple[int, ...]] = []
    take = offload.Offloader.take
    monkeypatch.setattr(
        offload.Offloader,
        "take",
        lambda self, t, once=False: taken.append((*t.shape, once)) or take(self, t, once),
    )
    step(model)
    wide = [shape for shape in taken if shape[1] >= 2 * 128]
    assert len(wide) == 1 and all(shape[-1] for shape in taken)
    # beside it only what is narrow, and small on a GPU's scale: rstd, XA
    assert all(shape[1] <= 64 for shape in taken if shape not in wide)
    assert fused.checkpointing.layers[0].spills


def test_how_many_layers_compute_attention_again(make_peft) -> None:
    model = make_peft("llama")
    chosen = apply(model, ALL, checkpointing=OFFLOAD).checkpointing
    chosen.layers = [chosen.layers[0]] * 9
    length = 2**17
    h = torch.empty(2, length, 64)
    o = 4 * h.shape[0] * length * chosen.layers[0].sizes.attention
    taken = chosen.layers[0].sizes.taken(2 * length, length, 4, 4)
    for host, expected in ((1e12, 0), (8 * taken - 1, 1), (8 * taken - 3 * o - 1, 4), (0, 8)):
        chosen.attention_again, chosen.modes = 0, [OFFLOAD] * 9
        chosen.fit_host(chosen.batch(h), host)
        assert chosen.attention_again == expected


def test_what_is_planned_for_a_stream_in_fp32(make_peft) -> None:
    chosen = apply(make_peft("llama"), ALL, checkpointing=AUTO).checkpointing
    h = torch.empty(2, 8192, 64)
    assert chosen.batch(h).itemsizes == (4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        batch = chosen.batch(h)
        assert chosen.batch(h.bfloat16()).itemsizes == (2, 2)
    assert batch.itemsizes == (2, 4)
    modes = [SELECTIVE] * 2
    in_fp32, in_bf16 = chosen.batch(h).bytes(modes), replace(batch, stream=2).bytes(modes)
    assert in_bf16 < batch.bytes(modes) < in_fp32


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_dropout_draws_the_same_masks_again(mode, make_peft, step) -> None:
    model = make_peft("llama", lora_dropout=0.3)
    results = []
    for one in (OFF, mode):
        fused = apply(model, ALL, checkpointing=one)
        torch.manual_seed(7)
        results.append(step(model))
        after = torch.rand(1)
        results[-1]["rng"] = after
        fused.unfuse()
    equal(results[1], results[0])


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_packed_documents(mode, make_peft, step, tokens) -> None:
    positions = torch.cat([torch.arange(12), torch.arange(8)]).repeat(2, 1).to(tokens.device)
    model = make_peft("llama")
    results = []
    for one in (OFF, mode):
        fused = apply(model, ALL, checkpointing=one)
        results.append(step(model, position_ids=positions, use_cache=False))
        fused.unfuse()
    equal(results[1], results[0])


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_two_forwards_before_one_backward(mode, make_peft, tokens) -> None:
    """As DPO does, and as a second backward through the same graph does."""
    model = make_peft("qwen3")
    results = []
    for one in (OFF, mode):
        fused = apply(model, ALL, checkpointing=one)
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss = loss + 2 * model(input_ids=tokens.flip(1), labels=tokens).loss
        loss.backward(retain_graph=True)
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        fused.unfuse()
    equal(results[1], results[0])


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_tiles_of_the_mlp(mode, make_peft, step, close, monkeypatch) -> None:
    monkeypatch.setitem(TILE_ROWS, SELECTIVE, 12)
    monkeypatch.setitem(TILE_ROWS, OFFLOAD, 7)
    model = make_peft("llama")
    stock = step(model)
    apply(model, ALL, checkpointing=mode)
    close(step(model), stock)


@contextmanager
def counting(device: torch.device) -> Iterator[Callable[[], int]]:
    """Bytes of the tensors that a graph keeps, storages counted once."""
    storages: dict[int, tuple[Tensor, int]] = {}
    seen: list[Tensor] = []
    pack = recomputation.Tape._pack

    def note(tape, tensor):
        packed = pack(tape, tensor)
        if isinstance(packed, recomputation._Here):
            storage = packed.kept.untyped_storage()
            storages[storage.data_ptr()] = packed.kept, storage.nbytes()
            seen.append(packed.kept)
        return packed

    recomputation.Tape._pack = note
    try:
        yield lambda: sum(nbytes for _, nbytes in storages.values())
    finally:
        recomputation.Tape._pack = pack


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_only_the_input_and_attentions_output_are_kept(family, make_peft, tokens, device) -> None:
    # As many heads of keys as of queries: no backend repeats them.
    config = FAMILY_CONFIGS[family]()
    config.num_key_value_heads = config.num_attention_heads
    model = make_peft(config)
    fused = apply(model, ALL, checkpointing=SELECTIVE)
    with counting(device) as kept:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        found = kept()
    sizes = fused.checkpointing.layers[0].sizes
    wide = 4 * tokens.numel() * (sizes.hidden + sizes.attention)
    # XA of the four groups, rstd, cos and sin, log-sum-exp, rstd of the norms on heads
    small = 4 * tokens.numel() * (4 * max(16, fold_alignment(device)) + 2 + 2 * 16 + 8 + 8)
    assert 2 * wide <= found <= 2 * (wide + small) + 4096
    loss.backward()


def test_nothing_outlives_the_step(make_peft, step) -> None:
    kinds = recomputation.Stage | offload.HostCopy | recomputation.Tape
    model = make_peft("llama")
    apply(model, ALL, checkpointing=OFFLOAD)
    gc.collect()
    before = [o for o in gc.get_objects() if isinstance(o, kinds)]  # of tests that have failed
    known = {id(o) for o in before}
    step(model)
    gc.collect()
    after = [o for o in gc.get_objects() if isinstance(o, kinds) and id(o) not in known]
    assert [type(o) for o in after] in ([], [recomputation.Tape])


def test_parameters_that_were_replaced_do_not_stay(make_peft) -> None:
    """FSDP puts shards in the place of a fused model's parameters."""
    model = make_peft("llama")
    fused = apply(model, ALL)
    before = {id(p) for p in fused.checkpointing.parameters()}
    assert before == {id(p) for p in model.parameters() if p.requires_grad}
    lora = next(m for m in model.modules() if hasattr(m, "lora_A"))
    old = weakref.ref(lora.lora_A["default"].weight)
    lora.lora_A["default"].weight = torch.nn.Parameter(old().detach().clone())
    assert old() is None
    assert id(lora.lora_A["default"].weight) in {id(p) for p in fused.checkpointing.parameters()}


def test_an_adapter_that_changed_meanwhile_is_an_error(make_peft, tokens) -> None:
    model = make_peft("llama")
    apply(model, ALL, checkpointing=SELECTIVE)
    loss = model(input_ids=tokens, labels=tokens).loss
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    with pytest.raises(RuntimeError, match=r"changed between forward and backward|inplace"):
        loss.backward()


@pytest.mark.parametrize("mode", [OFF, SELECTIVE])
def test_an_input_that_changed_meanwhile_is_an_error(mode, make_peft, tokens) -> None:
    model = make_peft("llama")
    fused = apply(model, ALL, checkpointing=mode)
    inputs = []
    layer = fused.checkpointing.layers[1].module
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    loss = model(input_ids=tokens, labels=tokens).loss
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place|inplace"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", [*MODES, AUTO])
def test_it_stands_in_for_the_trainers_own(mode, reentrant, make_peft, step, close) -> None:
    model = make_peft("llama")
    stock = step(model)
    model.enable_input_require_grads()
    enable = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.gradient_checkpointing_enable(**enable)
    fused = apply(model, ALL, checkpointing=mode)
    layers = [one.module for one in fused.checkpointing.layers]
    assert not any(layer.gradient_checkpointing for layer in layers)
    close(step(model), stock)
    expected = SELECTIVE if mode == AUTO and not torch.cuda.is_available() else mode
    if expected != AUTO:
        assert modes_of(fused) == [expected] * 2
    # The trainer may enable it later, when training begins: the first call still runs inside it.
    model.gradient_checkpointing_enable(**enable)
    close(step(model), stock)
    assert not any(layer.gradient_checkpointing for layer in layers)
    close(step(model), stock)
    fused.unfuse()
    assert all(layer.gradient_checkpointing for layer in layers)
    close(step(model), stock)


def test_a_copy_of_a_fused_model_trains(make_peft, step, close) -> None:
    model = make_peft("llama")
    apply(model, ALL, checkpointing=OFFLOAD)
    stock = step(model)
    close(step(copy.deepcopy(model)), stock)


def test_evaluation_and_frozen_passes_keep_nothing(make_peft, tokens) -> None:
    model = make_peft("llama")
    fused = apply(model, ALL, checkpointing=SELECTIVE)
    with torch.no_grad():
        model(input_ids=tokens, labels=tokens)
    assert [r.calls for r in fused.records if r.operation == checkpointing.OPERATION] == [0, 0]


def test_flags_that_can_do_nothing_say_so(make_peft, step, device) -> None:
    model = make_peft("llama")
    on_cpu = device.type == "cpu"
    for flags, said in (
        ({"checkpointing": OFFLOAD}, "offload is selective here: the model is on the cpu"),
        ({"budget_bytes": 1e9}, "fused_memory_gb has no effect: it is for a GPU"),
        ({"host_limit_bytes": 1e9}, "fused_host_gb has no effect: it is for a GPU"),
    ):
        fused = apply(model, ALL, **flags)
        assert any(said in note for note in fused.notes) == on_cpu
        fused.unfuse()
    fused = apply(model, {"lora_mlp": True}, budget_bytes=1e9)
    assert any("fused_memory_gb has no effect: no decoder layer" in n for n in fused.notes)
    fused.unfuse()
    bare = model.unload()
    (record,) = [
        r
        for r in apply(bare, ALL, checkpointing=SELECTIVE).records
        if r.operation == checkpointing.OPERATION
    ]
    assert not record.fused and "no LoRA adapters" in record.reason


def test_copies_that_wait_for_the_host_have_their_reason(make_peft, step, device) -> None:
    model = make_peft("llama")
    fused = apply(model, ALL, checkpointing=OFFLOAD)
    step(model)
    records = [r for r in fused.records if r.operation == checkpointing.OPERATION]
    assert all(not r.stock_calls for r in records)
    fused.checkpointing.offloader(device).pool.unpinned = 1
    for record in records:
        ((reason, calls),) = record.stock_calls.items()
        assert "can be pinned" in reason and calls == 1


def test_what_stands_in_for_the_trainers_own_is_said_at_once(make_peft) -> None:
    model = make_peft("llama")
    model.gradient_checkpointing_enable()
    fused = apply(model, ALL, checkpointing=SELECTIVE)
    assert any("2 decoder layers keep their activations by" in note for note in fused.notes)


def five_layers(make_peft, **options):
    return make_peft(Qwen3Config(**SMALL | {"num_hidden_layers": 5}, **HEAD), **options)


CARD_BYTES, HOST_BYTES = 80e9, 64e9


class OnGpu:
    """A layer's input, as `Checkpointing.begin` asks for it on a GPU."""

    is_cuda = True

    def __init__(self, h: Tensor) -> None:
        self.device, self.dtype, self.shape = h.device, h.dtype, h.shape


@pytest.fixture
def roomy(device, monkeypatch) -> None:
    """A GPU, or what is decided on one of 80 GB; a link that carries all while the GPU computes."""
    monkeypatch.setattr(checkpointing, "measured_rates", lambda index: Rates(1.0, 1e9))
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: HOST_BYTES)
    if device.type == "cuda":
        return
    begin = checkpointing.Checkpointing.begin
    monkeypatch.setattr(
        checkpointing.Checkpointing, "begin", lambda owner, h: begin(owner, OnGpu(h))
    )
    for name, found in (
        ("mem_get_info", (CARD_BYTES, CARD_BYTES)),
        ("memory_allocated", 0),
        ("memory_reserved", 0),
        ("get_device_properties", SimpleNamespace(total_memory=CARD_BYTES)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)


def half_full(owner: checkpointing.Checkpointing, device: torch.device) -> float:
    return 0.5 * torch.cuda.get_device_properties(device).total_memory


@pytest.fixture
def made_again(monkeypatch) -> list[None]:
    """One entry for each time that an MLP computes gate/up again."""
    found: list[None] = []
    recompute = lora_mlp._recompute_gate_up
    monkeypatch.setattr(
        lora_mlp, "_recompute_gate_up", lambda *args: found.append(None) or recompute(*args)
    )
    return found


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD])
def test_gate_up_of_every_other_layer_waits_where_there_is_room(
    mode, roomy, made_again, make_peft, step, monkeypatch
) -> None:
    """Not the last one's, which is asked for at once: of two layers none would go."""
    model = five_layers(make_peft, dtype=torch.bfloat16)
    fused = apply(model, ALL, checkpointing=OFF)
    off = step(model)
    fused.unfuse()
    assert not made_again
    for host_limit, full, waiting in (
        (None, False, 2),
        (1e9, False, 2),
        (1e3, False, 0),  # the host is too small
        (None, True, 0),  # half of the GPU is taken
    ):
        with monkeypatch.context() as patch:
            if full:
                patch.setattr(checkpointing.Checkpointing, "free_bytes", half_full)
            fused = apply(model, ALL, checkpointing=mode, host_limit_bytes=host_limit)
            for _ in range(2):
                made_again.clear()
                equal(step(model), off)
                assert len(made_again) == 5 - waiting
        spills = [layer.spills for layer in fused.checkpointing.layers]
        assert spills == ([False, True, False, True, False] if waiting else [False] * 5)
        fused.unfuse()


@pytest.mark.parametrize(
    ("mode", "budget", "times"),
    [(OFF, None, 0), (SELECTIVE, None, 1), (OFFLOAD, None, 1), (AUTO, None, 0), (AUTO, 1.0, 1)],
)
def test_the_host_is_asked_once_a_step(
    mode, budget, times, roomy, make_peft, step, monkeypatch
) -> None:
    asked = []
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: asked.append(None) or HOST_BYTES)
    fused = apply(model := make_peft("llama"), ALL, checkpointing=mode, budget_bytes=budget)
    step(model)
    assert len(asked) == times
    if mode == AUTO:
        assert fused.checkpointing.modes == [OFFLOAD if budget else OFF] * 2


@pytest.mark.parametrize("mode", MODES)
def test_attention_and_down_run_once(
    mode, made_again, make_peft, step, device, monkeypatch
) -> None:
    # In fp32 a GPU's attention saves copies of its own in place of q, k and v.
    model = make_peft("llama", torch.float32 if device.type == "cpu" else torch.bfloat16)
    fused = apply(model, ALL, checkpointing=mode)
    ran: Counter[str] = Counter()
    for kind, name in (
        (FusedDecoderLayer, "project"), (FusedDecoderLayer, "attend"),
        (FusedDecoderLayer, "add_attention"), (MlpReader, "__call__"),
    ):  # fmt: skip
        method = getattr(kind, name)

        def counted(*args, method=method, name=name, **kwargs):
            ran[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(kind, name, counted)
    step(model)
    assert modes_of(fused) == [mode] * 2
    again = 2 * (mode != OFF)
    assert ran == {"project": 2 + again, "attend": 2, "add_attention": 2 + again, "__call__": 2}
    assert len(made_again) == again


@pytest.mark.parametrize("mode", [SELECTIVE, OFFLOAD, AUTO])
def test_dropout_packed_documents_and_accumulation_together(
    mode, roomy, make_peft, tokens, monkeypatch
) -> None:
    """Two micro-batches into the same gradients; gate/up of some layers waits on the host."""
    positions = torch.cat([torch.arange(12), torch.arange(8)]).repeat(2, 1).to(tokens.device)
    model = five_layers(make_peft, lora_dropout=0.2)
    results = []
    for one in (OFF, mode):
        fused = apply(model, ALL, checkpointing=one)
        if one == AUTO:  # one of the five layers may keep all
            batch = fused.checkpointing.batch(torch.empty(*tokens.shape, 64, device=tokens.device))
            free = 1.01 * batch.bytes([SELECTIVE] * 4 + [OFF])
            monkeypatch.setattr(fused.checkpointing, "free_bytes", lambda device, free=free: free)
        torch.manual_seed(5)
        for ids in (tokens, tokens.flip(1)):
            loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
            loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        results[-1]["loss"] = loss.detach()
        results[-1]["rng"] = torch.rand(1)
        model.zero_grad(set_to_none=True)
        if one == AUTO:
            assert fused.checkpointing.modes[-1] == OFF != fused.checkpointing.modes[0]
        assert any(layer.spills for layer in fused.checkpointing.layers) == (one != OFF)
        fused.unfuse()
    equal(results[1], results[0])


def test_a_longer_batch_is_planned_for(roomy, make_peft, step, tokens, monkeypatch) -> None:
    model = five_layers(make_peft)
    fused = apply(model, ALL, checkpointing=OFF)
    batches = [tokens, tokens.repeat(4, 1), tokens]
    off = [step(model, input_ids=ids, labels=ids) for ids in batches]
    fused.unfuse()
    chosen = (fused := apply(model, ALL, checkpointing=AUTO)).checkpointing
    h = torch.empty(*tokens.shape, 64, device=tokens.device)
    free = 1.01 * chosen.batch(h).bytes([OFF] * 5)
    monkeypatch.setattr(chosen, "free_bytes", lambda device: free)
    found = []
    for ids, expected in zip(batches, off, strict=True):
        equal(step(model, input_ids=ids, labels=ids), expected)
        found.append(chosen.modes)
    assert found[0] == found[2] == [OFF] * 5
    assert found[1][0] != OFF


def test_each_pass_is_planned_where_the_first_layer_goes_the_stock_way(
    make_peft, step, monkeypatch
) -> None:
    model = make_peft("llama")
    fused = apply(model, ALL, checkpointing=SELECTIVE)
    planned_for: list[Tensor] = []
    begin = checkpointing.Checkpointing.begin
    monkeypatch.setattr(
        checkpointing.Checkpointing,
        "begin",
        lambda owner, h: planned_for.append(h) or begin(owner, h),
    )
    hook = fused.checkpointing.layers[0].module.mlp.register_forward_hook(lambda *_: None)
    for passes in (1, 2):
        step(model)
        assert len(planned_for) == passes
    hook.remove()
    step(model)
    assert len(planned_for) == 3 and fused.checkpointing.modes == [SELECTIVE] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_goes_the_stock_way_keeps_the_trainers(
    reentrant, make_peft, step, close
) -> None:
    model = make_peft("llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    stock = step(model)
    fused = apply(model, ALL, checkpointing=SELECTIVE)
    ran: list[None] = []
    mlp = fused.checkpointing.layers[1].module.mlp
    mlp.register_forward_pre_hook(lambda *_: ran.append(None))
    for _ in range(2):
        ran.clear()
        close(step(model), stock)
        assert len(ran) == 2  # once more in backward
    assert [layer.whole_calls for layer in fused.checkpointing.layers] == [2, 0]


def test_what_is_cheaper_after_running_out_of_memory(roomy, device) -> None:
    chosen = checkpointing.Checkpointing(AUTO)
    assert chosen.cheaper() is None  # nothing has been planned
    for modes, spilled, expected in (
        ([SELECTIVE, OFF], [True, False], SELECTIVE),
        ([SELECTIVE, SELECTIVE], [True, False], OFFLOAD),
        ([OFFLOAD, SELECTIVE], [True, False], "offload, with no gate/up on the host"),
    ):
        assert chosen.spill(device) is not None
        chosen.modes, chosen.spilled = modes, spilled
        assert chosen.cheaper() == expected
    assert chosen.spill(device) is None
    # The host's limit keeps a layer `selective`: the same plan again would fail again.
    chosen.spilled = [False, False]
    assert chosen.cheaper() is None
    for mode in MODES:
        fixed = checkpointing.Checkpointing(mode)
        fixed.modes = [mode]
        assert fixed.cheaper() is None
