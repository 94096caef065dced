"""Models of images and text: training with images against stock, and what images ask of a layer."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lorafuse import fuse
from lorafuse.patches import attention
from lorafuse.patches.attention import CAUSAL, DOCUMENTS, MASK, merge_axes
from lorafuse.patches.decoder_layer import FusedDecoderLayer
from lorafuse.plugin.family_trial import (
    IMAGE_TEXT,
    decoder_layers,
    largest_error,
    looking,
    one_step,
    tiny_model,
)
from lorafuse.plugin.image_batch import image_batch, text_batch
from lorafuse.plugin.tiny_config import tiny_config

STEPS = 20
PIXTRAL = {
    "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
# Llama 3.2 Vision is mllama; Pixtral is a Llava with a tower of its own, and Mistral 3 holds one.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2-VL": ("qwen2_vl", {}),
    "Qwen2.5-VL": ("qwen2_5_vl", {}),
    "Gemma 3": ("gemma3", {}),
    "Llama 3.2 Vision": ("mllama", {}),
    "Pixtral": ("llava", PIXTRAL),
    "Mistral 3": ("mistral3", {}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are quicker so, and none of two processes waits for the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(model_type: str, **changes: Any) -> Any:
    return tiny_model(tiny_config(model_type, images=True, **changes), IMAGE_TEXT)


def train(model: Any, optimizer: type[torch.optim.Optimizer]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, the pixels new in each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = optimizer(parameters, lr=2e-3)  # type: ignore[call-arg]
    batch = image_batch(model.get_base_model())
    curve = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(batch["pixel_values"].shape, generator=generator)
        loss = model(**{**batch, "pixel_values": pixels}).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        steps.step()
        steps.zero_grad()
        curve.append((float(loss), float(norm)))
    return curve


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_with_images_are_those_of_stock(name: str) -> None:
    model_type, changes = TRAINED[name]
    stock = train(make(model_type, **changes), torch.optim.AdamW)
    model = make(model_type, **changes)
    report = fuse(model)
    fused = train(model, torch.optim.AdamW)
    report.check_called()
    assert stock[-1][0] < stock[0][0] - 0.2  # it learns
    for step, ((loss, norm), (other_loss, other_norm)) in enumerate(zip(stock, fused, strict=True)):
        assert other_loss == pytest.approx(loss, rel=1e-4), step
        assert other_norm == pytest.approx(norm, rel=1e-3), step


def whole(model: nn.Module, *, vision: bool) -> list[FusedDecoderLayer]:
    looks = looking(model)
    layers = [m for name, m in decoder_layers(model).items() if (name in looks) == vision]
    forwards = [layer.__dict__.get("forward") for layer in layers]
    return [forward for forward in forwards if isinstance(forward, FusedDecoderLayer)]


def test_a_vision_tower_of_norms_and_gated_mlps_is_fused_whole() -> None:
    model = make("llava", **PIXTRAL)
    batch = image_batch(model.get_base_model())
    stock = one_step(model, batch)
    report = fuse(model)
    error, where = largest_error(one_step(model, batch), stock)
    assert error < 1e-4, where
    layers = whole(model, vision=True)
    assert len(layers) == 4 and all(layer.calls == 1 for layer in layers)
    # The plan of what is kept counts the tokens of text; a tower has other rows.
    assert all(layer.checkpointing is None for layer in layers)
    assert report.operations()["checkpointing"].fused == len(whole(model, vision=False)) == 4
    report.unfuse()
    assert not whole(model, vision=True)


def test_a_whole_vision_layer_keeps_the_trainers_checkpointing() -> None:
    """Around its forward (transformers 5.24) or around the call, it runs again in backward."""
    model = make("llava", **PIXTRAL)
    model.enable_input_require_grads()
    batch = image_batch(model.get_base_model())
    stock = one_step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fuse(model)
    error, where = largest_error(one_step(model, batch), stock)
    assert error < 1e-4, where
    assert [layer.calls for layer in whole(model, vision=True)] == [2] * 4
    assert [layer.calls for layer in whole(model, vision=False)] == [1] * 4  # ours stands in there


def test_a_vision_tower_that_a_trial_would_change_is_left_alone() -> None:
    model = make("mistral3")
    tower = model.get_base_model().model.vision_tower
    tower.statistics = nn.BatchNorm2d(3)
    report = fuse(model)
    assert not whole(model, vision=True) and len(whole(model, vision=False)) == 4
    assert any("batch norm" in str(r) for r in report.operations()["rope"].fallbacks)
    assert tower.statistics.num_batches_tracked == 0


def test_positions_of_an_image_differ_by_axis_and_a_mix_up_of_axes_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("qwen2_vl")
    batch = image_batch(model.get_base_model())
    positions: list[torch.Tensor] = []
    rotary = model.get_base_model().model.language_model.rotary_emb
    hook = rotary.register_forward_hook(lambda _, args, kwargs, __: positions.append(
        kwargs.get("position_ids", args[-1])
    ), with_kwargs=True)  # fmt: skip
    stock = one_step(model, batch)
    hook.remove()
    time, height, width = positions[0]
    assert (time != height).any() and (height != width).any() and (time == width).any()

    report = fuse(model)
    assert len(whole(model, vision=False)) == 4
    assert largest_error(one_step(model, batch), stock)[0] < 1e-4
    report.unfuse()
    # The proof runs on text, whose positions are the same on each axis.
    own, merged = merge_axes, []
    monkeypatch.setattr(
        attention, "merge_axes", lambda x, axes: merged.append(1) or own(x.flip(0), axes)
    )
    report = fuse(model)
    if not merged:  # transformers 5.24 does it where the model makes cos and sin
        assert largest_error(one_step(model, batch), stock)[0] < 1e-4
        return
    assert not whole(model, vision=False)
    assert any("verification in fp32" in str(r) for r in report.operations()["rope"].fallbacks)
    assert largest_error(one_step(model, batch), stock)[0] < 1e-4


def test_image_tokens_that_attend_both_ways_keep_their_mask() -> None:
    model = make("gemma3")
    core = model.get_base_model()
    images, text = image_batch(core), text_batch(core)
    stock = [one_step(model, batch) for batch in (images, text)]
    report = fuse(model)
    assert largest_error(one_step(model, images), stock[0])[0] < 1e-4
    masks = report.masks()
    assert masks[MASK] == 4 and not {CAUSAL, DOCUMENTS} & set(masks), masks
    assert largest_error(one_step(model, text), stock[1])[0] < 1e-4


def test_layers_that_ignore_the_image_are_fused_beside_those_that_attend_to_it() -> None:
    model = make("mllama")
    batch = image_batch(model.get_base_model())
    fuse(model)
    one_step(model, batch)
    layers = whole(model, vision=False)
    assert [layer.calls for layer in layers] == [1, 1]
    for layer in layers:
        assert layer.attention.ignored["cross_attention_states"]
        assert all(layer.attention.ignored.values())
    assert not any(layer.stock_calls for layer in layers)


def test_an_attention_to_another_sequence_runs_as_stock() -> None:
    # The decoder's cross-attention looks like its self-attention, and is proven as one.
    model = make("florence2")
    batch = image_batch(model.get_base_model())
    stock = one_step(model, batch)
    fuse(model)
    assert largest_error(one_step(model, batch), stock)[0] < 1e-4
