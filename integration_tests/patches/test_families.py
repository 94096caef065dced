"""Each proven family: fused as a whole layer, and right, in every dtype and in NF4."""

import pytest
import torch

from lorafuse.patches.apply import OPERATIONS, apply

ALL = dict.fromkeys(OPERATIONS, True)
FAMILIES = [
    "llama",
    "llama-biased",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "glm4",
    "granite",
    "ernie",
    "smollm3",
]
LAYER = ("lora_mlp", "lora_qkv", "lora_o", "rope")


def assert_whole(fused) -> None:
    """Both layers whole, the final norm and the loss on their own, and all of it called once."""
    by_operation = {name: [r for r in fused.records if r.operation == name] for name in OPERATIONS}
    for name in LAYER:
        assert [r.level for r in by_operation[name]] == ["layer"] * 2, by_operation[name]
    assert all(r.fused for r in fused.records), [r for r in fused.records if not r.fused]
    assert sum(r.level == "part" for r in by_operation["rms_norm"]) == 1
    assert len(by_operation["cross_entropy"]) == 1
    assert all(r.calls == 1 and not r.stock_calls for r in fused.records)


@pytest.mark.parametrize("nf4", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_gradients_are_stocks(family, nf4, make_peft, step, close) -> None:
    model = make_peft(family, nf4=nf4)
    stock = step(model)
    fused = apply(model, ALL)
    ours = step(model)
    assert_whole(fused)
    close(ours, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_errors_are_at_most_twice_stocks(
    family, dtype, make_peft, step, oracle_model
) -> None:
    model = make_peft(family, dtype)
    exact, stock = step(oracle_model(model)), step(model)
    fused = apply(model, ALL)
    ours = step(model)
    assert_whole(fused)
    floor = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for name, expected in exact.items():
        scale = expected.norm().clamp_min(1e-12)
        errors = [float((got[name].float() - expected).norm() / scale) for got in (ours, stock)]
        assert errors[0] <= 2 * errors[1] + floor, (name, errors)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_nf4_in_bf16(family, make_peft, step) -> None:
    model = make_peft(family, torch.bfloat16, nf4=True)
    stock = step(model)
    fused = apply(model, ALL)
    ours = step(model)
    assert_whole(fused)
    assert abs(float(ours["loss"]) - float(stock["loss"])) < 2e-2
    for name, expected in stock.items():
        error = (ours[name].float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.1, (name, float(error))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_five_optimiser_steps_follow_stock(family, make_peft, curve) -> None:
    curves = []
    for fuse in (False, True):
        model = make_peft(family)
        fused = apply(model, ALL) if fuse else None
        curves.append(curve(model, 5, 5e-3))
    assert curves[0][0][0] - curves[0][-1][0] > 0.05  # it learns
    for (loss, norm), (our_loss, our_norm) in zip(*curves, strict=True):
        assert abs(our_loss - loss) < 1e-4
        assert abs(our_norm / norm - 1) < 1e-3
    assert fused is not None and all(r.calls == 5 for r in fused.records)


@pytest.mark.parametrize("only", ["lora_mlp", "lora_qkv", "lora_o", "rms_norm", "cross_entropy"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_one_flag_fuses_that_operation_alone(family, only, make_peft, step, close) -> None:
    model = make_peft(family)
    stock = step(model)
    fused = apply(model, {only: True})
    ours = step(model)
    assert {r.operation for r in fused.records} == {only}
    assert all(r.fused and r.level == "part" and r.calls for r in fused.records), fused.records
    close(ours, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_parts(family, make_peft, step, close) -> None:
    model = make_peft(family, nf4=family == "llama")
    stock = step(model)
    fused = apply(model, ALL | {"rope": False})
    ours = step(model)
    assert all(r.fused and r.level == "part" and r.calls for r in fused.records), fused.records
    close(ours, stock)


def test_rope_without_its_projections_says_so(make_peft) -> None:
    fused = apply(make_peft("llama"), {"rope": True})
    assert {r.reason for r in fused.records} == {
        "RoPE is fused only together with fused_lora_qkv and fused_lora_o"
    }


def test_padding_masks_and_position_ids_reach_attention(make_peft, tokens, close) -> None:
    model = make_peft("mistral")
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    packed = torch.arange(20, device=tokens.device).remainder(9)[None].expand(2, -1)
    for kwargs in ({"attention_mask": mask}, {"position_ids": packed}):
        with torch.no_grad():
            stock = model(input_ids=tokens, **kwargs).logits
            fused = apply(model, ALL)
            ours = model(input_ids=tokens, **kwargs).logits
        fused.unfuse()
        kept = mask.bool() if "attention_mask" in kwargs else torch.ones_like(mask).bool()
        torch.testing.assert_close(ours[kept], stock[kept], rtol=1e-4, atol=1e-4)
