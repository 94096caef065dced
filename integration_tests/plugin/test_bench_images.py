"""`lorafuse bench` with images: published geometries, their cuts, the batches, and real runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig
from typer.testing import CliRunner

from lorafuse.patches.label_places import IGNORED
from lorafuse.plugin.bench_images import row_images
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model, inputs, parameters
from lorafuse.plugin.bench_systems import UnsupportedError, patch_base
from lorafuse.plugin.cli import app
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.fuse import fuse
from lorafuse.plugin.geometries import Model, find_model, layers_of, model_names
from lorafuse.plugin.image_geometry_table import IMAGE_GEOMETRIES, NAMED_IMAGE_FAMILIES
from lorafuse.plugin.tiny_config import tiny_config

JOB = Job("stock", "", None, "none", 4, 2, 64, 1, False, 1, None, "cpu")
# Parameters as published.
COUNTS = {
    "llama-3.2-11b-vision": 10_670_220_835, "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-7b": 8_292_166_656, "pixtral-12b": 12_682_739_712,
    "gemma-3-12b-vision": 12_187_325_040,
}  # fmt: skip
# A tiny one of each: its model type, and what is to be as in the geometry.
PIXTRAL = {
    "text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
}  # fmt: skip
SIGLIP = {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-11b-vision": ("mllama", {}),
    "qwen2-vl-7b": ("qwen2_vl", {}),
    "qwen2.5-vl-7b": ("qwen2_5_vl", {}),
    "pixtral-12b": ("llava", PIXTRAL),
    "gemma-3-12b-vision": ("gemma3", SIGLIP),
}


def tiny(name: str) -> PretrainedConfig:
    model_type, changes = TINY[name]
    return tiny_config(model_type, images=True, **changes)


@pytest.mark.parametrize("name", IMAGE_GEOMETRIES)
def test_geometries_have_the_published_numbers_of_parameters(name: str) -> None:
    assert parameters(find_model(name)) == COUNTS[name]


def test_all_are_named() -> None:
    assert model_names(NAMED_IMAGE_FAMILIES) == [*IMAGE_GEOMETRIES] == [*COUNTS] == [*TINY]
    for name, one in IMAGE_GEOMETRIES.items():
        assert one.family and one.config().model_type == tiny(name).model_type
    help_text = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "2000"}).output
    assert all(name in help_text for name in (*IMAGE_GEOMETRIES, NAMED_IMAGE_FAMILIES))


@pytest.mark.parametrize("name", IMAGE_GEOMETRIES)
def test_layers_of_both_towers_are_cut(name: str) -> None:
    assert layers_of(find_model(name, 4).config) == [4, 4]
    text, vision = layers_of(find_model(name).config)
    assert layers_of(find_model(name, text).config) == [text, min(text, vision)]
    with pytest.raises(FuseConfigError, match=f"the model has {text}"):
        find_model(name, text + 1)


def test_lists_that_name_layers_are_cut_too() -> None:
    config: Any = find_model("llama-3.2-11b-vision", 10).config
    assert config.get_text_config().cross_attention_layers == [3, 8]
    vision = config.vision_config
    assert vision.intermediate_layers_indices == [3, 7] and vision.num_global_layers == 8
    assert vision.vision_output_dim == 3 * 1280
    vision = find_model("llama-3.2-11b-vision", 2).config.vision_config  # the last, where none is
    assert vision.intermediate_layers_indices == [1] and vision.num_global_layers == 2
    assert find_model("qwen2.5-vl-7b", 8).config.vision_config.fullatt_block_indexes == [7]
    assert find_model("qwen2.5-vl-7b", 4).config.vision_config.fullatt_block_indexes == [3]
    kinds = find_model("gemma-3-12b-vision", 6).config.get_text_config().layer_types
    assert kinds == ["sliding_attention"] * 5 + ["full_attention"]


# Of 4,096 tokens: each image's height and width, the tokens that stand for it.
ROWS = {
    "llama-3.2-11b-vision": [((1120, 1120), 1), ((560, 1120), 1)],
    "qwen2-vl-7b": [((896, 896), 1026), ((448, 896), 514)],
    "qwen2.5-vl-7b": [((896, 896), 1026), ((448, 896), 514)],
    "pixtral-12b": [((496, 496), 31 * 32), ((240, 496), 15 * 32)],
    "gemma-3-12b-vision": [((896, 896), 258), ((896, 896), 258)],
}


@pytest.mark.parametrize("name", IMAGE_GEOMETRIES)
def test_a_row_at_released_sizes(name: str) -> None:
    images = row_images(find_model(name).config, 4096)
    assert [(one.pixels, len(one.ids)) for one in images] == ROWS[name]


@pytest.mark.parametrize("name", TINY)
def test_a_batch(name: str) -> None:
    """The same again, and no label on what stands for an image."""
    config: Any = tiny(name)
    batch = inputs(JOB, config)
    for key, value in inputs(JOB, config).items():
        assert torch.equal(batch[key], value), key
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (2, 64)
    ignored = labels == IGNORED
    assert bool((ignored.sum(1) == sum(len(one.ids) for one in row_images(config, 64))).all())
    assert bool(ignored[ids == config.image_token_id].all())
    assert torch.equal(labels[~ignored], ids[~ignored]) and not bool(ignored[:, 0].any())


def gradients(name: str, how: str) -> dict[str, Tensor]:
    """Of every adapter in a first step: `fp32`, `stock` or `fused`, these in bf16."""
    model: Any = adapted(base_model(Model(name, tiny(name), None), JOB), JOB)
    if how == "fp32":
        model.float()
    elif how == "fused":
        fuse(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "fp32"):
        model(**inputs(JOB, model.config), use_cache=False).loss.backward()
    found = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return {name: grad.float() for name, grad in found if grad is not None}


@pytest.mark.parametrize("name", TINY)
def test_both_towers_learn_no_further_from_fp32_than_twice_stock(name: str) -> None:
    exact, stock, fused = (gradients(name, how) for how in ("fp32", "stock", "fused"))
    assert exact.keys() == stock.keys() == fused.keys()
    for tower in (True, False):
        names = [name for name in exact if ("vis" in name) == tower]
        whole, of_stock, of_fused = (
            torch.cat([one[name].flatten() for name in names]) for one in (exact, stock, fused)
        )
        assert whole.norm() > 0
        assert (of_fused - whole).norm() <= 2 * (of_stock - whole).norm(), f"vision: {tower}"


def test_each_token_sees_the_last_image_before_it() -> None:
    config: Any = tiny("llama-3.2-11b-vision")
    batch = inputs(JOB, config)
    first, second = (batch["input_ids"][0] == config.image_token_id).nonzero().flatten().tolist()
    mask = batch["cross_attention_mask"][0]  # (tokens, images, tiles)
    assert mask.shape == (64, 2, 4) and not mask[:first].any()
    assert mask[first:second].tolist() == [[[1] * 4, [0] * 4]] * (second - first)
    assert mask[second:].tolist() == [[[0] * 4, [1, 1, 0, 0]]] * (64 - second)
    assert batch["aspect_ratio_ids"].tolist() == [[6, 2]] * 2  # 2 x 2 and 1 x 2 tiles
    assert not batch["pixel_values"][:, 1, 2:].any()


def test_pixtrals_lines_end_with_tokens_of_their_own() -> None:
    config: Any = find_model("pixtral-12b").config
    large, small = row_images(config, 64)
    assert small.ids == (10, 10, 10, 13) and large.ids == (*[10, 10, 10, 12] * 2, *small.ids)
    assert row_images(config, 10**6)[0].pixels == (1024, 1024)


@pytest.mark.parametrize(
    ("name", "checkpointing", "mode"),
    [
        ("qwen2.5-vl-7b", "--checkpointing", "selective"),
        ("pixtral-12b", "--no-checkpointing", "off"),
    ],
)
def test_stock_and_fused_train_the_same_curve(
    name: str, checkpointing: str, mode: str, tmp_path: Path
) -> None:
    """As for the README's table, through real processes."""
    folder, file = tmp_path / name, tmp_path / "bench.json"
    tiny(name).save_pretrained(folder)
    result = CliRunner().invoke(app, [
        "bench", "--model", str(folder), "--layers", "2", "--device", "cpu", "--tokens", "64",
        "--rank", "4", "--steps", "2", "--rounds", "1", "--quant", "none", "--systems",
        "stock,lorafuse", checkpointing, "--flag", f"fused_checkpointing={mode}", "--json",
        str(file),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    stock, fused = json.loads(file.read_text("utf-8"))["systems"].values()
    (measured,) = stock["rounds"]
    assert f"stock: sdpa attention; {measured['images']}\n" in result.stdout
    assert measured["images"].startswith("images of ")
    assert measured["model_class"].endswith("ForConditionalGeneration")
    # As for text alone (`test_bench`).
    assert fused["largest_loss_difference"] < 1e-2
    assert fused["largest_relative_gradient_norm_difference"] < 2e-2
    operations = fused["rounds"][0]["report"]["operations"]
    for operation in ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "cross_entropy"):
        counts = operations[operation]
        assert counts["called"] == counts["found"] > 0, operation
    assert operations["lora_qkv"]["found"] == 4  # two layers of each tower


def test_what_does_not_go_with_images(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny("gemma-3-12b-vision").save_pretrained(folder)
    for options, message in (
        (("--documents", "2"), "such rows are not packed"),
        (("--padding", "0.2"), "such rows are of one length; leave it out"),
        (("--tokens", "14"), "has no room for a row's 2 images with text around them; give 15"),
    ):
        arguments = ["bench", "--model", str(folder), "--device", "cpu", "--quant", "none"]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 1 and message in result.stderr, result.output
    base = base_model(find_model(str(folder)), JOB)
    for system in ("liger", "axolotl"):
        with pytest.raises(UnsupportedError, match="text alone"):
            patch_base(base, Job(system, str(folder), None, "none", 4, 2, 64, 1, False, 1, None,
                                 "cpu"))  # fmt: skip
