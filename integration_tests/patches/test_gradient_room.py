"""In a fused model the gradients between the blocks come with room, and are stock's."""

import pytest
import torch

from lorafuse.kernels import gradient_room, lora_linear, lora_mlp
from lorafuse.patches.apply import OPERATIONS, apply


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_room_reaches_o_and_down(
    make_peft, close, device, monkeypatch, family, checkpointing
) -> None:
    """Two layers, o and down of both; Gemma has norms behind its blocks."""
    taken = []

    def record(ctx, dy):
        wide = gradient_room.take_room(ctx, dy)
        if wide is not None:
            taken.append(wide)
        return wide

    tokens = torch.randint(3, 128, (2, 40), device=device)  # more rows than features: folds

    def gradients(model) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = make_peft(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    stock = gradients(model)
    apply(model, dict.fromkeys(OPERATIONS, True))
    # Only now, for verification takes room as well.
    monkeypatch.setattr(lora_linear, "take_room", record)
    monkeypatch.setattr(lora_mlp, "take_room", record)
    close(gradients(model), stock)
    assert len(taken) == 4
