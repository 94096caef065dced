"""torch.compile around a fused model: it goes around what it cannot trace, and numbers stay."""

import torch

from lorafuse.patches.apply import OPERATIONS, apply


def test_a_fused_model_may_be_compiled(make_peft, step, close) -> None:
    model = make_peft("llama")
    stock = step(model, use_cache=False)
    fused = apply(model, dict.fromkeys(OPERATIONS, True))
    torch._dynamo.reset()
    try:
        ours = step(torch.compile(model, backend="aot_eager"), use_cache=False)
    finally:
        torch._dynamo.reset()
    close({name.removeprefix("_orig_mod."): value for name, value in ours.items()}, stock)
    calls = {r.operation: r.calls for r in fused.records}
    assert calls["lora_mlp"] and calls["lora_qkv"] and calls["lora_o"]
