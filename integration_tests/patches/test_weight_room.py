"""Base weights in buffers with room for LoRA: the same numbers, nothing lost, and the way back."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.weight_room import OPERATION, WeightRoom, WeightRoomRecord

ALL = dict.fromkeys(OPERATIONS, True)


def fold(model, **kwargs):
    return apply(model, ALL, folded_weights=True, **kwargs)


def records(fused) -> list[WeightRoomRecord]:
    return [r for r in fused.records if isinstance(r, WeightRoomRecord)]


def bases(model) -> dict[str, torch.nn.Parameter]:
    """The base weights that carry LoRA, by name."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    own = {id(m.get_base_layer().weight) for m in layers}
    return {n: p for n, p in model.named_parameters() if id(p) in own}


def folded(model) -> list[str]:
    return [name for name, p in bases(model).items() if not p.is_contiguous()]


@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen3", "gemma2", "phi3", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["off", "selective"])
def test_gradients_as_without_it(make_peft, step, close, oracle_model, family, dtype, mode):
    model = make_peft(family, dtype)
    exact = step(oracle_model(model))
    stock = step(model)
    weights = {n: p.detach().clone() for n, p in bases(model).items()}
    fused = fold(model, checkpointing=mode)
    for _ in range(2):  # the step that moves them, and one that finds them there
        ours = step(model)
        for name, expected in exact.items():
            scale = expected.double().norm()
            error, allowed = (
                (found[name].double() - expected.double()).norm() for found in (ours, stock)
            )
            assert error <= 2 * allowed + 1e-4 * scale, name
    assert len(folded(model)) == len(weights) == len(records(fused))
    assert all(r.fused and r.calls == 2 and not r.stock_calls for r in records(fused))
    fused.unfuse()
    assert not folded(model)
    assert all(torch.equal(p, weights[n]) for n, p in bases(model).items())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in bases(model).values())
    close(step(model), stock, 1e-6)


def test_projections_that_are_fused_alone(make_peft, step, close):
    model = make_peft("llama")
    stock = step(model)
    parts = {"lora_qkv": True, "lora_o": True, "lora_mlp": True}
    fused = apply(model, parts, folded_weights=True)
    close(step(model), stock)
    close(step(model), stock)
    assert len(folded(model)) == len(bases(model))
    fused.unfuse()


def test_other_adapters_meet_other_widths(make_peft, step, close):
    """One with more columns than the room has goes without it; a narrower one fits."""
    from peft import LoraConfig

    model = make_peft("llama", r=4)
    for name, rank in (("wide", 40), ("narrow", 1)):
        model.add_adapter(name, LoraConfig(r=rank, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "default" not in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    stock = {}
    for name in ("default", "wide", "narrow"):
        model.set_adapter(name)
        stock[name] = step(model)
    model.set_adapter("default")
    fused = fold(model)
    for name in ("default", "wide", "narrow", "default"):
        model.set_adapter(name)
        close(step(model), stock[name])
    with model.disable_adapter():
        model(input_ids=torch.ones(1, 3, dtype=torch.long, device=model.device))
    fused.unfuse()


def test_only_training_moves_them(make_peft, tokens):
    model = make_peft("llama").eval()
    fold(model)
    with torch.no_grad():
        model(tokens)
    with torch.inference_mode():
        model.train()(tokens)
    assert not folded(model)
    model(tokens)
    assert folded(model)


def test_what_stays_where_it_is(make_peft, step):
    model = make_peft("llama")
    inner = model.get_base_model().model.layers
    shared = inner[0].mlp.down_proj.get_base_layer()
    inner[1].mlp.down_proj.get_base_layer().weight = shared.weight
    whole = torch.randn(3, 64, 64, device=shared.weight.device)
    inner[0].self_attn.o_proj.get_base_layer().weight.data = whole[1]
    inner[1].self_attn.o_proj.get_base_layer().weight.ds_id = 3
    fused = fold(model)
    step(model)
    step(model)
    why = {r.module.split("layers.")[1]: (r.reason, r.stock_calls) for r in records(fused)}
    assert "used by another module" in why["0.mlp.down_proj"][0]
    assert why["0.self_attn.o_proj"][1] == {"its weight is a view of other memory": 2}
    assert why["1.self_attn.o_proj"][1] == {"FSDP or ZeRO manages its weight": 2}
    assert why["0.mlp.up_proj"] == ("", {})
    assert len(folded(model)) == len(bases(model)) - 3  # of the shared one there is one


def test_quantised_weights_say_that_they_have_it_anyway(make_peft):
    fused = fold(make_peft("llama", torch.bfloat16, nf4=True))
    assert {r.reason for r in records(fused)} == {
        "its weight is quantised, and written into such a buffer in each pass anyway"
    }
    assert any("no weight moves" in note for note in fused.notes)


def test_a_parameter_that_is_replaced_is_read_where_it_lies(make_peft, step, close):
    """As FSDP and merging do; the rest of its group goes without the room."""
    model, twin = make_peft("llama"), make_peft("llama")
    fused = fold(model)
    step(model)
    for one in (model, twin):
        up = one.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
        up.weight = torch.nn.Parameter(up.weight.detach().clone() * 1.5, requires_grad=False)
    for _ in range(2):
        close(step(model), step(twin))
    lost = [r for r in records(fused) if r.stock_calls]
    assert {r.module.rsplit(".")[-1] for r in lost} == {"up_proj", "gate_proj"}
    fused.unfuse()
    assert not folded(model)
    close(step(model), step(twin))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging(make_peft, step, tokens, merge, tmp_path):
    model, twin = make_peft("llama"), make_peft("llama")
    fold(model)
    step(model)
    merged = [getattr(one, merge)() or one for one in (model, twin)]
    for one in merged:
        one.eval()
    with torch.no_grad():
        ours, stock = (one(tokens).logits for one in merged)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    if merge == "merge_and_unload":
        merged[0].save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(model.device).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, stock, rtol=1e-4, atol=1e-4)


def test_whatever_saves_it_saves_every_weight(make_peft, step, tmp_path):
    model = make_peft("llama", torch.bfloat16)
    wanted = {n: t.clone() for n, t in model.state_dict().items()}
    fold(model)
    step(model)
    assert len(folded(model)) == len(bases(model))
    state = model.state_dict()
    assert list(state) == list(wanted)
    # Savers take tensors of one storage for one tensor.
    storages = Counter(state[n].untyped_storage().data_ptr() for n in bases(model))
    assert set(storages.values()) == {1}
    torch.save(state, tmp_path / "state.pt")
    Accelerator().save_model(model, tmp_path / "accelerate")
    model.get_base_model().save_pretrained(tmp_path / "base")
    for found in (
        torch.load(tmp_path / "state.pt", map_location=model.device),
        load_file(tmp_path / "accelerate" / "model.safetensors", device=str(model.device)),
    ):
        assert all(torch.equal(found[n], t) for n, t in wanted.items())
    base = load_file(tmp_path / "base" / "model.safetensors", device=str(model.device))
    for name in bases(model):
        key = name.removeprefix("base_model.model.")
        assert torch.equal(base[key], wanted[name])
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_peft("llama").unload(), tmp_path / "adapter")
    name = next(n for n in wanted if "lora_A" in n)
    assert torch.equal(again.state_dict()[name].to(wanted[name]), wanted[name])


def test_loading_a_state_into_it(make_peft, step, close):
    model, other = make_peft("llama"), make_peft("llama")
    for p in other.parameters():
        p.data *= 1.1
    fold(model)
    step(model)
    model.load_state_dict(other.state_dict())
    assert len(folded(model)) == len(bases(model))
    close(step(model), step(other))


def test_copies_have_weights_of_their_own(make_peft, step, close):
    model = make_peft("llama")
    stock = step(model)
    fused = fold(model)
    step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for p in bases(twin).values():
            assert p.data_ptr() not in {q.data_ptr() for q in bases(model).values()}
        close(step(twin), stock)
    close(step(model), stock)
    fused.unfuse()


def test_a_buffer_that_does_not_fit_leaves_all_as_it_is(make_peft, step, close, monkeypatch):
    model = make_peft("llama")
    stock = step(model)
    reason = "there was no memory for a buffer to move it into"
    monkeypatch.setattr(WeightRoom, "_move", lambda self: reason)
    fused = fold(model)
    close(step(model), stock)
    assert not folded(model)
    assert all(r.stock_calls == {reason: 1} for r in records(fused))


def test_not_unless_it_is_asked_for(make_peft, step):
    model = make_peft("llama")
    fused = apply(model, ALL)
    step(model)
    assert not folded(model) and not records(fused)
    assert all(r.operation != OPERATION for r in fused.records)
