"""Padded batches whose padding is not computed: stock's numbers, of fewer tokens."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import FalconConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, MixtralConfig

from lorafuse.patches import padding_free
from lorafuse.patches.apply import OPERATIONS, FusedModel, apply
from lorafuse.patches.bind import Unsupported
from lorafuse.patches.label_places import IGNORED
from lorafuse.patches.padding_free import MULTIPLE, WORTH, read_rows, verify_padding_free

from .conftest import SMALL

ALL = dict.fromkeys(OPERATIONS, True)
LENGTHS = (40, 11, 23, 6)
LONG = SMALL | {"max_position_embeddings": 128}
FAMILIES = ["llama", "llama-biased", "qwen2", "qwen3", "gemma3", "phi3", "granite", "smollm3"]


def batch(device: torch.device, left: bool = False) -> dict[str, Tensor]:
    """Rows of `LENGTHS`, padded to the longest."""
    longest = max(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (len(LENGTHS), longest), generator=generator)
    place = torch.arange(longest)
    mask = torch.stack([place >= longest - n if left else place < n for n in LENGTHS]).long()
    labels = ids.masked_fill(mask == 0, IGNORED)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in found.items()} | {"use_cache": False}


def record(fused: FusedModel) -> Any:
    (one,) = (r for r in fused.records if r.operation == "padding_free")
    return one


class Seen:
    """The shapes in which a module's input comes, by a hook that a fused form passes over."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        embedding = model.get_input_embeddings()
        forward = embedding.forward
        monkeypatch.setattr(
            embedding, "forward", lambda ids: self.tokens.append(ids.numel()) or forward(ids)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_stock_one(family, make_peft, step, close, device, monkeypatch) -> None:
    model = make_peft(family)
    inputs = batch(device)
    stock = step(model, **inputs)
    seen = Seen(model, monkeypatch)
    fused = apply(model, ALL, padding_free=True)
    assert record(fused).fused, record(fused).reason
    seen.tokens.clear()
    close(step(model, **inputs), stock)
    assert record(fused).calls == 1 and not record(fused).stock_calls
    rest = sum(LENGTHS) % MULTIPLE
    assert seen.tokens == [sum(LENGTHS) + MULTIPLE - rest] and seen.tokens[0] < 4 * 40
    fused.unfuse()
    close(step(model, **inputs), stock, 0)
    assert seen.tokens[-1] == 4 * 40


@pytest.mark.parametrize("checkpointing", ["off", "selective", "offload"])
def test_with_experts_and_memory_plans(checkpointing, make_peft, step, close, device) -> None:
    for config in (MixtralConfig(**LONG, num_local_experts=4), LlamaConfig(**LONG)):
        model = make_peft(config)
        stock = step(model, **batch(device))
        fused = apply(model, ALL, checkpointing=checkpointing, padding_free=True)
        close(step(model, **batch(device)), stock)
        assert record(fused).calls == 1


def test_several_steps_train_alike(make_peft, curve, device) -> None:
    model = make_peft("llama")
    start = copy.deepcopy(model.state_dict())
    stock = curve(model, 5, 1e-2, **batch(device))
    model.load_state_dict(start)
    fused = apply(model, ALL, padding_free=True)
    ours = curve(model, 5, 1e-2, **batch(device))
    assert torch.tensor(ours).sub(torch.tensor(stock)).abs().max() < 1e-4
    assert record(fused).calls == 5


@pytest.mark.parametrize("labelled", [False, True])
def test_padding_in_front(labelled, make_peft, step, close, device) -> None:
    """The last of it predicts the first token: only where that has no label is it left out."""
    model = make_peft("llama")
    inputs = batch(device, left=True)
    first = inputs["attention_mask"].argmax(1)
    if not labelled:
        inputs["labels"][range(4), first] = IGNORED
    stock = step(model, **inputs)
    fused = apply(model, ALL, padding_free=True)
    close(step(model, **inputs), stock)
    assert record(fused).calls == int(not labelled)
    assert list(record(fused).stock_calls) == ["padding has to predict a label"] * labelled


def test_what_goes_on_padded(make_peft, step, close, device) -> None:
    model = make_peft("llama")
    fused = apply(model, ALL, padding_free=True)
    whole = batch(device)
    mask, length = whole["attention_mask"], max(LENGTHS)
    holes = mask.clone()
    holes[0, 5:9] = 0
    documents = (torch.arange(length, device=device) % 4).expand(4, -1)
    on_padding = whole["input_ids"].clone()
    little = torch.ones_like(mask)
    little[1, 30:] = 0
    cases = {
        f"more than {WORTH:.0%} of the batch are tokens, or none is": {"attention_mask": little},
        "it was called without an attention mask [rows, tokens]": {"attention_mask": None},
        "a row has padding between its tokens": {"attention_mask": holes},
        "a row's positions do not go on from token to token": {"position_ids": documents},
        "padding has to predict a label": {"labels": on_padding},
        "it fills a KV cache: pass use_cache=False": {"use_cache": True},
        "hidden states, attention weights or router logits are asked for": {
            "output_hidden_states": True
        },
    }
    for reason, changed in cases.items():
        inputs = whole | changed
        if "attention_mask" in changed and changed["attention_mask"] is not None:
            inputs["labels"] = whole["input_ids"].masked_fill(changed["attention_mask"] == 0, -100)
        model.train()
        fused.unfuse()
        stock = step(model, **inputs)
        fused = apply(model, ALL, padding_free=True)
        close(step(model, **inputs), stock)
        assert list(record(fused).stock_calls) == [reason] and not record(fused).calls
    model.eval()
    with torch.no_grad():
        model(**whole)
    assert "the model is evaluated" in record(fused).stock_calls


def test_positions_of_the_caller_and_embedded_words(make_peft, step, close, device) -> None:
    model = make_peft("llama")
    inputs = batch(device)
    inputs["position_ids"] = torch.arange(max(LENGTHS), device=device).add(3).expand(4, -1)
    words = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs |= {"inputs_embeds": words, "input_ids": None}
    stock = step(model, **inputs)
    fused = apply(model, ALL, padding_free=True)
    close(step(model, **inputs), stock)
    assert record(fused).calls == 1
    hidden = model.base_model.model.model(
        inputs_embeds=words, attention_mask=inputs["attention_mask"], use_cache=False,
        return_dict=False,
    )[0]  # fmt: skip
    padding = inputs["attention_mask"] == 0
    assert hidden.shape == words.shape and not hidden[padding].any() and hidden[~padding].all()


class PositionsAlone(LlamaModel):
    """Looks the same, and lets the documents of a row see each other."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None,
                **kwargs: Any):  # fmt: skip
        if attention_mask is None and input_ids is not None:
            attention_mask = torch.ones_like(input_ids)
        return super().forward(
            input_ids, attention_mask, position_ids, use_cache=use_cache, **kwargs
        )


class NoPositions(LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs: Any):
        return super().forward(input_ids, attention_mask, use_cache=use_cache, **kwargs)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        (PositionsAlone, "its hidden states are others without the padding"),
        (NoPositions, "NoPositions takes no position_ids"),
    ],
)
def test_models_that_do_not_keep_documents_apart(backbone, reason, make_peft, step, device) -> None:
    model = LlamaForCausalLM(LlamaConfig(**LONG))
    model.model = backbone(model.config)
    peft = make_peft(model)
    stock = step(peft, **batch(device))["loss"]
    fused = apply(peft, ALL, padding_free=True)
    assert not record(fused).fused and record(fused).reason == reason
    assert float(step(peft, **batch(device))["loss"]) == pytest.approx(float(stock), rel=1e-5)


def test_a_model_that_numbers_its_tokens_otherwise(make_peft, device) -> None:
    config = FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True
    )
    fused = apply(make_peft(config), ALL, padding_free=True)
    # transformers 5.24 has masks for ALiBi that keep documents apart; its attention is not fused.
    assert record(fused).reason in (
        "its hidden states are others without the padding", "attention is fused in 0 of 2 layers",
    )  # fmt: skip


def test_weights_that_somebody_else_manages(make_peft) -> None:
    model = make_peft("llama")
    next(model.base_model.model.model.parameters()).ds_id = 0  # as DeepSpeed's ZeRO-3 does
    fused = apply(model, ALL, padding_free=True)
    assert record(fused).reason == "its weights are sharded: fuse before the model is wrapped"


def test_attention_that_is_not_fused(make_peft) -> None:
    fused = apply(make_peft("llama"), ALL | {"lora_qkv": False, "lora_o": False, "rope": False},
                  padding_free=True)  # fmt: skip
    assert record(fused).reason == "attention is fused in 0 of 2 layers"


def test_the_trial_leaves_nothing_behind(make_peft) -> None:
    model = make_peft("llama", lora_dropout=0.5)
    backbone = model.base_model.model.model
    backbone.layers[1].eval()
    modes = [m.training for m in backbone.modules()]
    buffers = {name: b.clone() for name, b in backbone.named_buffers()}
    state = torch.get_rng_state()
    assert verify_padding_free(backbone) is None
    assert [m.training for m in backbone.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in backbone.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_it_compiles(make_peft, step, close, device) -> None:
    model = make_peft("llama")
    stock = step(model, **batch(device))
    fused = apply(model, ALL, padding_free=True)
    compiled = torch.compile(model, backend="eager")
    loss = compiled(**batch(device)).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(stock["loss"]), rel=1e-5)
    assert record(fused).calls == 1


def test_a_copy_has_its_own(make_peft, step, close, device) -> None:
    model = make_peft("llama")
    stock = step(model, **batch(device))
    fused = apply(model, ALL, padding_free=True)
    twin = copy.deepcopy(model)
    close(step(twin, **batch(device)), stock)
    assert not record(fused).calls
    forward = twin.base_model.model.model.__dict__["forward"]
    assert forward.calls == 1 and forward.module is twin.base_model.model.model


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    longest=st.integers(1, 100),
    left=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_rows(lengths: list[int], longest: int, left: bool) -> None:
    place, hidden = torch.arange(longest), 3
    lengths = [min(n, longest) for n in lengths]
    mask = torch.stack([place >= longest - n if left else place < n for n in lengths])
    nothing = torch.zeros_like(mask)
    count = sum(lengths)
    if not 0 < count <= WORTH * mask.numel():
        with pytest.raises(Unsupported, match="of the batch are tokens"):
            read_rows(mask, None, nothing)
        return
    rows = read_rows(mask, None, nothing)
    T = len(rows.index)
    assert rows.real == count < T and T == min(mask.numel(), count + MULTIPLE - count % MULTIPLE)
    assert rows.index.unique().numel() == T  # each place once
    values = torch.randn(1, T, hidden)
    whole = rows.spread(values)
    assert torch.equal(whole[mask], values[0, :count]) and not whole[~mask].any()
    ids = torch.arange(mask.numel()).view(mask.shape)
    packed = rows.packed({"input_ids": ids, "attention_mask": mask, "use_cache": False})
    assert torch.equal(packed["input_ids"][0, :count], ids[mask])
    assert torch.equal(packed["position_ids"][0, :count], place.expand_as(mask)[mask])
    # The largest position of the padded batch is there, as dynamic frequencies want it.
    assert packed["position_ids"].max() == longest - 1
    assert packed["attention_mask"] is None and packed["use_cache"] is False


def test_more_tokens_than_a_mask_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding_free, "MOST_TOKENS", 20)
    mask = torch.zeros(2, 40)
    mask[:, :11] = 1
    with pytest.raises(Unsupported, match="more than 20 tokens"):
        read_rows(mask, None)
