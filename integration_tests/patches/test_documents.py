"""Masks of packed and padded batches, and training with them: the stock model's numbers."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lorafuse.patches import attention
from lorafuse.patches import documents as module
from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.attention import CAUSAL, MASK
from lorafuse.patches.documents import DocumentFinder

LENGTH = 12


def config(**more):
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa", **more,
    )  # fmt: skip


def mask_of(rows, positions=None, attention_mask=None, function=create_causal_mask, **more):
    """What transformers' own code builds for a batch."""
    return function(
        config=config(**more),
        inputs_embeds=torch.zeros(rows, LENGTH, 32),
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=None if positions is None else torch.tensor(positions),
    )


def positions_of(*lengths):
    return [i for length in lengths for i in range(length)]


def padding(*lengths, left=False):
    rows = [[0] * (LENGTH - n) + [1] * n if left else [1] * n + [0] * (LENGTH - n) for n in lengths]
    return torch.tensor(rows)


def test_packed_documents():
    mask = mask_of(2, [positions_of(5, 1, 6), positions_of(12)])
    layout = DocumentFinder().of_mask(mask, 2)
    assert layout is not None and not layout.plain
    assert layout.documents.starts == (0, 5, 6, 12) and layout.documents.tokens == 24


def test_one_row_of_positions_for_the_whole_batch():
    mask = mask_of(1, [positions_of(5, 7)])
    layout = DocumentFinder().of_mask(mask, 3)
    assert layout is not None and layout.documents.starts == (0, 5, 12, 17, 24, 29)


def test_padding_behind_is_plain_causal_attention():
    layout = DocumentFinder().of_mask(mask_of(3, attention_mask=padding(5, 12, 1)), 3)
    assert layout is not None and layout.plain


def test_padding_behind_documents_is_one_more():
    positions = torch.tensor([positions_of(5, 4, 3)])
    mask = mask_of(1, positions.tolist())
    mask[:, :, :, 9:] = False
    layout = DocumentFinder().of_mask(mask, 1)
    assert layout is not None and not layout.plain
    assert layout.documents.starts == (0, 5, 9)


def test_padding_in_front_stays_with_the_mask():
    mask = mask_of(2, attention_mask=padding(5, 12, left=True))
    assert DocumentFinder().of_mask(mask, 2) is None


def test_what_is_not_documents_is_not_taken_for_them():
    sliding = mask_of(1, function=create_sliding_window_causal_mask, sliding_window=4)
    assert DocumentFinder().of_mask(sliding, 1) is None
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert DocumentFinder().of_mask(causal[None, None], 1) is not None
    for i, j in ((3, 7), (7, 3), (11, 0), (5, 5)):  # one entry off
        odd = causal.clone()
        odd[i, j] = ~odd[i, j]
        assert DocumentFinder().of_mask(odd[None, None], 1) is None, (i, j)
    assert DocumentFinder().of_mask(causal[None, None].float(), 1) is None
    assert DocumentFinder().of_mask(causal[None, None].expand(1, 2, -1, -1), 1) is None


def test_a_mask_is_compared_in_parts(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 30)
    mask = mask_of(2, [positions_of(5, 1, 6), positions_of(12)])
    layout = DocumentFinder().of_mask(mask, 2)
    assert layout is not None and layout.documents.starts == (0, 5, 6, 12)
    mask[1, 0, 11, 2] = False
    assert DocumentFinder().of_mask(mask, 2) is None


def test_a_batch_is_read_once_and_never_taken_for_another(monkeypatch):
    reads = []
    real = module._read_mask
    monkeypatch.setattr(module, "_read_mask", lambda *a: reads.append(1) or real(*a))
    finder = DocumentFinder()
    packed = mask_of(1, [positions_of(5, 7)])
    sliding = mask_of(1, function=create_sliding_window_causal_mask, sliding_window=4)
    for _ in range(3):
        assert finder.of_mask(packed.detach(), 1) is not None
        assert finder.of_mask(sliding, 1) is None
    assert len(reads) == 4  # a detached tensor that does not outlive its call is read each time
    reads.clear()
    for _ in range(3):
        assert finder.of_mask(packed, 1) is finder.of_mask(packed.detach(), 1)
    assert len(reads) == 1
    packed[:, :, 5:, 4] = True
    assert finder.of_mask(packed, 1) is None
    for copied in (copy.deepcopy(finder), pickle.loads(pickle.dumps(finder))):
        assert copied._seen == []


def test_positions_as_axolotl_packs():
    finder = DocumentFinder()
    layout = finder.of_positions(torch.tensor([positions_of(5, 7), positions_of(12)]), 2)
    assert layout is not None and layout.documents.starts == (0, 5, 12) and not layout.plain
    layout = finder.of_positions(torch.arange(LENGTH)[None], 2)
    assert layout is not None and layout.plain and layout.documents.starts == (0, 12)
    assert finder.of_positions(torch.arange(1, LENGTH)[None], 1) is None
    assert finder.of_positions(torch.zeros(3, 1, LENGTH, dtype=torch.long), 1) is None


ALL = dict.fromkeys(OPERATIONS, True)
PACKED = [positions_of(5, 1, 6, 8), positions_of(20)]
LEFT, RIGHT = (
    [[i >= n for i in range(20)] for n in (0, 7)],
    [[i < n for i in range(20)] for n in (20, 9)],
)


@pytest.fixture
def varlen_calls(monkeypatch):
    calls = []
    real = attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", lambda *a: calls.append(a[3]) or real(*a))
    return calls


def batch_of(name, tokens):
    """(arguments, labels) of a batch of `tokens`; padding has no labels."""
    if name == "packed":
        return {"position_ids": torch.tensor(PACKED, device=tokens.device)}, tokens
    mask = torch.tensor(LEFT if name == "padded left" else RIGHT, device=tokens.device)
    return {"attention_mask": mask.long()}, tokens.where(mask, -100)


def run(model, tokens, arguments, labels):
    model.zero_grad()
    # With a KV cache, transformers does not look for documents at all.
    loss = model(input_ids=tokens, labels=labels, use_cache=False, **arguments).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {
        "loss": loss.detach()
    }


@pytest.mark.parametrize("batch", ["packed", "padded left", "padded right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize("level", ["layer", "attention"])
def test_training_gives_stocks_gradients(
    make_peft, tokens, close, varlen_calls, family, batch, level
):
    model = make_peft(family)
    arguments, labels = batch_of(batch, tokens)
    stock = run(model, tokens, arguments, labels)
    fused = apply(model, ALL if level == "layer" else ALL | {"rms_norm": False})
    varlen_calls.clear()  # proofs have packed rows, too
    ours = run(model, tokens, arguments, labels)
    close(ours, stock)
    assert sum(r.calls for r in fused.records if r.operation == "lora_qkv") == 2
    # Windows of 8 tokens: Mistral's in each layer, in the first of Gemma 3's two.
    full = (
        2
        if family in ("llama", "qwen3")
        else sum(kind == "full_attention" for kind in getattr(model.config, "layer_types", []))
    )
    # FlashAttention has no fp32: there the GPU keeps to the mask.
    documents = batch == "packed" and tokens.device.type == "cpu"
    assert len(varlen_calls) == (full if documents else 0)
    ways = fused.masks()
    assert ways.get(attention.DOCUMENTS, 0) == len(varlen_calls)
    assert ways.get(attention.CAUSAL, 0) == (full if batch == "padded right" else 0)
    assert sum(ways.values()) == 2
    if varlen_calls:
        assert len(set(map(id, varlen_calls))) == 1, "the mask was read for each layer anew"


def test_evaluation_and_a_switched_off_attention_keep_the_mask(make_peft, tokens, varlen_calls):
    model = make_peft("llama")
    arguments, labels = batch_of("packed", tokens)
    stock = run(model, tokens, arguments, labels)
    for setting in ("sdpa", "auto"):
        fused = apply(model, ALL, attention=setting)
        varlen_calls.clear()
        if setting == "auto":
            model.eval()
        torch.testing.assert_close(run(model, tokens, arguments, labels)["loss"], stock["loss"])
        assert not varlen_calls
        fused.unfuse()


@pytest.mark.parametrize("batch", ["packed", "padded right"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_reads_the_mask_once(make_peft, tokens, close, monkeypatch, batch, reentrant):
    reads = []
    real = module._read_mask
    monkeypatch.setattr(module, "_read_mask", lambda *a: reads.append(1) or real(*a))
    model = make_peft("llama")
    arguments, labels = batch_of(batch, tokens)
    stock = run(model, tokens, arguments, labels)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    apply(model, ALL)
    reads.clear()
    close(run(model, tokens, arguments, labels), stock)
    assert len(reads) == 1


def test_axolotls_packing_is_read_once(make_peft, tokens, close, varlen_calls, monkeypatch):
    varlen = pytest.importorskip("axolotl.monkeypatch.attention.sdpa_varlen")
    if not varlen.varlen_available():
        pytest.skip("needs torch 2.10")
    model = make_peft("llama")
    packed, labels = batch_of("packed", tokens)
    stock = run(model, tokens, packed, labels)
    reads = []
    real = module._read_positions
    monkeypatch.setattr(module, "_read_positions", lambda *a: reads.append(1) or real(*a))
    try:
        assert varlen.patch_sdpa_varlen()
        close(run(model, tokens, packed, labels), stock)
        apply(model, ALL)
        reads.clear()
        varlen_calls.clear()
        close(run(model, tokens, packed, labels), stock)
        assert len(varlen_calls) == (2 if tokens.device.type == "cpu" else 0)
        assert len(reads) == 1
        whole = {"position_ids": torch.arange(20, device=tokens.device)[None].expand(2, -1)}
        before = len(varlen_calls)
        run(model, tokens, whole, labels)
        assert len(varlen_calls) == before
    finally:
        varlen.unpatch_sdpa_varlen()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", ["packed", "padded right"])
def test_16_bit_training_on_a_gpu(make_peft, oracle_model, tokens, varlen_calls, batch):
    """bf16, as users train: no further from fp32 than twice stock's own distance."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = make_peft("llama", dtype=torch.bfloat16)
    arguments, labels = batch_of(batch, tokens)
    exact = run(oracle_model(model), tokens, arguments, labels)
    stock = run(model, tokens, arguments, labels)
    apply(model, ALL)
    varlen_calls.clear()
    ours = run(model, tokens, arguments, labels)
    assert len(varlen_calls) == (2 if batch == "packed" else 0)
    for name, truth in exact.items():
        error, allowed = ((x[name].float() - truth).norm() for x in (ours, stock))
        assert error <= 2 * allowed + 4e-3 * truth.norm(), name


@pytest.mark.parametrize("loss_is_fused", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_labels_on_padding_are_trained_on_as_stock_does(
    loss_is_fused, shifted, make_peft, step, close, device
) -> None:
    """`labels = input_ids.clone()`: its padding attends to the row's tokens, and predicts."""
    model = make_peft("llama")
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    where = {"labels": ids, "shift_labels": ids.roll(-1, 1)} if shifted else {"labels": ids}
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **where}
    stock = step(model, **inputs)
    fused = apply(model, ALL | {"cross_entropy": loss_is_fused})
    close(step(model, **inputs), stock)
    assert fused.masks() == {MASK: 2}
    where = {name: label.masked_fill(mask == 0, -100) for name, label in where.items()}
    fused.unfuse()
    stock = step(model, **{**inputs, **where})
    fused = apply(model, ALL | {"cross_entropy": loss_is_fused})
    close(step(model, **{**inputs, **where}), stock)
    # Shifted by one, the last token of the row does not predict its padding.
    assert fused.masks() == {CAUSAL: 2}
