"""What PEFT's state says is computed right, or goes the stock way with its reason."""

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from lorafuse.patches.apply import OPERATIONS, apply

ALL = dict.fromkeys(OPERATIONS, True)


def reasons(fused) -> set[str]:
    return {r.reason for r in fused.records if not r.fused}


def stock_reasons(fused) -> set[str]:
    return {reason for r in fused.records for reason in r.stock_calls}


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj", "o_proj"]},
        {"use_rslora": True, "r": 6},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all"},
    ],
    ids=["q and v", "down and o", "rslora", "lora bias", "trained biases", "all biases"],
)
def test_computed_states(lora, make_peft, step, close) -> None:
    model = make_peft("llama-biased", **lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data = 0.1 * torch.randn_like(parameter)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    called = {r.operation for r in fused.records if r.calls and not r.stock_calls}
    assert {"lora_mlp", "lora_qkv", "lora_o", "rope"} <= called


def test_dropout_trajectory_equals_stocks(make_peft, curve, tokens) -> None:
    curves = []
    for fuse in (False, True):
        model = make_peft("llama", lora_dropout=0.2)
        fused = apply(model, ALL) if fuse else None
        torch.manual_seed(11)
        curves += curve(model, 3, 1e-3)
    assert fused is not None and all(r.calls == 3 for r in fused.records)
    if tokens.is_cpu:  # on a GPU the masks depend on the dtype that PEFT casts to
        for (loss, norm), (our_loss, our_norm) in zip(curves[:3], curves[3:], strict=True):
            assert abs(our_loss - loss) < 1e-5 and abs(our_norm / norm - 1) < 1e-4


def test_two_active_adapters_disabled_merged_and_switched(make_peft, step, close, tokens) -> None:
    model = make_peft("llama")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    fused = apply(model, ALL)

    def both(**kwargs):
        ours = step(model, **kwargs)
        fused.unfuse()
        stock = step(model, **kwargs)
        return ours, stock

    close(*both())
    model.base_model.set_adapter(["default", "second"])
    fused = apply(model, ALL)
    close(*both())
    assert not stock_reasons(fused)
    fused = apply(model, ALL)
    model.set_adapter("second")
    close(*both())
    fused = apply(model, ALL)
    with torch.no_grad(), model.disable_adapter():
        ours = model(input_ids=tokens).logits
        fused.unfuse()
        torch.testing.assert_close(ours, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
    fused = apply(model, ALL)
    model.merge_adapter()
    with torch.no_grad():
        ours = model(input_ids=tokens).logits
        fused.unfuse()
        torch.testing.assert_close(ours, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()


def test_dora_falls_back_with_its_reason(make_peft, step, close) -> None:
    model = make_peft("llama", use_dora=True)
    stock = step(model)
    fused = apply(model, ALL | {"cross_entropy": False, "rms_norm": False})
    assert any("LoRA variant" in reason for reason in reasons(fused)), reasons(fused)
    close(step(model), stock, 1e-6)


def test_trained_base_weights_and_norms(make_peft, step, close) -> None:
    model = make_peft("llama")
    core = model.get_base_model()
    core.model.layers[0].mlp.down_proj.base_layer.weight.requires_grad_(True)
    core.model.layers[1].input_layernorm.weight.requires_grad_(True)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    assert "its base weight is trainable" in reasons(fused)
    mlps = [r for r in fused.records if r.operation == "lora_mlp"]
    assert [r.fused for r in mlps] == [False, True]
    assert sum(r.fused for r in fused.records if r.operation == "rms_norm") == 5


def test_modules_to_save(make_peft, step, close) -> None:
    model = make_peft(
        "llama", target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "o_proj"]
    )
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    assert any("modules_to_save" in reason or "trainable" in reason for reason in reasons(fused))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_peft, step, close, reentrant) -> None:
    model = make_peft("llama", lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(2)
    stock = step(model)
    fused = apply(model, ALL)
    torch.manual_seed(2)
    close(step(model), stock, 1e-4 if next(model.parameters()).is_cpu else 0.5)
    # once forward, and not again in backward: our own checkpointing stands in for torch's
    layers = [r for r in fused.records if r.operation == "lora_mlp"]
    assert [r.calls for r in layers] == [1, 1]


def test_generation_gives_stocks_tokens_through_a_kv_cache(make_peft, tokens) -> None:
    model = make_peft("qwen2").eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(input_ids=tokens, **settings)
    fused = apply(model, ALL)
    assert torch.equal(model.generate(input_ids=tokens, **settings), stock)
    assert any("KV cache" in reason for reason in stock_reasons(fused))


def test_hooks_on_inner_modules_run(make_peft, step, close) -> None:
    model = make_peft("llama")
    stock = step(model)
    fused = apply(model, ALL)
    seen = []
    layer = model.get_base_model().model.layers[0]
    handles = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in (layer.mlp, layer.self_attn.q_proj)
    ]
    close(step(model), stock)
    assert len(seen) == 2
    assert any("has to run" in reason for reason in stock_reasons(fused))
    for handle in handles:
        handle.remove()
    assert len(seen) == 2
    close(step(model), stock)
    assert len(seen) == 2


class Gathers(nn.Module):
    """FSDP1's wrapper: the weight of what it wraps is a matrix only while it is called."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.shape = linear, linear.weight.shape
        linear.weight.data = linear.weight.data.flatten()

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight.view(self.shape))


def test_matrices_that_a_wrapper_gathers_when_called(make_peft, step, close) -> None:
    model = make_peft("llama")
    stock = step(model)
    fused = apply(model, ALL)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    for matrices in (layer.lora_A, layer.lora_B):
        matrices["default"] = Gathers(matrices["default"])
    ours = step(model)
    renamed = {name.replace(".linear.", "."): x for name, x in ours.items()}
    close({name: x.view_as(stock[name]) for name, x in renamed.items()}, stock)
    (reason,) = stock_reasons(fused)
    assert "FSDP takes each of them on its own (Gathers)" in reason


def test_4_bit_weights_that_were_gathered_into_plain_parameters(make_peft, step) -> None:
    """As FSDP2 does; bitsandbytes' own forward takes the state from the layer, too."""
    model = make_peft("llama", nf4=True)
    fused = apply(model, ALL)
    expected = step(model)
    for module in model.modules():
        if hasattr(module._parameters.get("weight"), "quant_state"):
            data = module.weight.data.as_subclass(Tensor).clone()
            module._parameters["weight"] = nn.Parameter(data, requires_grad=False)
    ours = step(model)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    assert not stock_reasons(fused)


def test_hidden_states_and_attentions_when_asked_for(make_peft, tokens) -> None:
    model = make_peft("llama", attention="eager").eval()
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    with torch.no_grad():
        stock = model(input_ids=tokens, **asked)
        apply(model, ALL)
        ours = model(input_ids=tokens, **asked)
    assert len(ours.hidden_states) == len(stock.hidden_states) == 3
    assert len(ours.attentions) == len(stock.attentions) == 2
    for a, b in zip(
        [*ours.hidden_states, *ours.attentions],
        [*stock.hidden_states, *stock.attentions],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_kv_cache_in_training_is_filled(make_peft, step, close) -> None:
    model = make_peft("llama")
    stock = step(model, use_cache=True)
    fused = apply(model, ALL)
    close(step(model, use_cache=True), stock)
    assert not stock_reasons(fused)
