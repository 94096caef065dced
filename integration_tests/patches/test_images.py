"""Models of images and text in bf16 and NF4: both towers adapted, a batch with images.

In fp32 they are in `plugin/test_image_text.py`.
"""

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from sixteen_bit import no_further_from_fp32_than_stock
from torch import Tensor

from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.decoder_layer import FusedDecoderLayer
from lorafuse.plugin.family_trial import IMAGE_TEXT
from lorafuse.plugin.image_batch import image_batch
from lorafuse.plugin.tiny_config import tiny_config

ALL = dict.fromkeys(OPERATIONS, True)
PIXTRAL = {
    "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
# model type, changes to its tiny config, layers fused whole
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen2-VL": ("qwen2_vl", {}, 4),
    "Qwen2.5-VL": ("qwen2_5_vl", {}, 4),
    "Gemma 3": ("gemma3", {}, 4),
    "Llama 3.2 Vision": ("mllama", {}, 2),
    "Pixtral": ("llava", PIXTRAL, 8),
    "Mistral 3": ("mistral3", {}, 8),
}


def check(name: str, nf4: bool, make_peft: Any, step: Any, curve: Any, device: Any) -> None:
    model_type, changes, layers = MODELS[name]
    config = tiny_config(model_type, images=True, **changes)
    torch.manual_seed(0)
    base = getattr(transformers, IMAGE_TEXT).from_config(config, dtype=torch.float32)
    batch = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in image_batch(base).items()
    }
    model = make_peft(base, torch.bfloat16, nf4, task_type=None)

    def fuse(ours: Any) -> Any:
        result = apply(ours, ALL)
        forwards = [m.__dict__.get("forward") for m in ours.modules()]
        whole = [f for f in forwards if isinstance(f, FusedDecoderLayer)]

        def called() -> None:
            assert len(whole) == layers, result.notes
            assert all(layer.calls and not layer.stock_calls for layer in whole)

        return called

    step, curve = partial(step, **batch), partial(curve, **batch)
    no_further_from_fp32_than_stock(model, fuse, step, curve)


@pytest.mark.gpu
@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_in_16_bit(name, nf4, make_peft, step, curve, device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    check(name, nf4, make_peft, step, curve, device)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Llama 3.2 Vision"])
def test_in_bf16(name, make_peft, step, curve, device) -> None:
    check(name, False, make_peft, step, curve, device)
