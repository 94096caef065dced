"""The geometries by name: as published, buildable, and the named families among them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import base_model, batch, parameters
from lorafuse.plugin.cli import app
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.family_readme import NAMED
from lorafuse.plugin.geometries import find_model, keep_layers, model_names
from lorafuse.plugin.geometry_table import GEOMETRIES, NAMED_FAMILIES
from lorafuse.plugin.sketch import shrink

JOB = Job("stock", "tiny", None, "none", 4, 2, 32, 1, False, 1, None, "cpu")
# Parameters as published, in units of 1e9.
BILLIONS = {
    "llama-3.1-8b": 8.030, "llama-3.1-70b": 70.554, "llama-3.2-1b": 1.236, "llama-2-7b": 6.738,
    "mistral-7b": 7.248, "mistral-nemo-12b": 12.248, "mistral-large": 122.610,
    "ministral-8b": 8.020, "gemma-7b": 8.538, "gemma-2-9b": 9.242, "gemma-3-12b": 11.766,
    "qwen1.5-7b": 7.721, "qwen2.5-7b": 7.616, "qwen3-8b": 8.191, "phi-2": 2.780,
    "phi-3.5-mini": 3.821, "phi-4": 14.660, "deepseek-v2-lite": 15.706, "deepseek-v3": 671.026,
    "mixtral-8x7b": 46.703, "mixtral-8x22b": 140.621, "qwen2-57b-a14b": 57.409,
    "qwen3-30b-a3b": 30.532, "gpt-oss-20b": 20.915, "granite-3.1-8b": 8.171,
    "command-r7b": 8.028, "olmo-2-7b": 7.299, "olmo-3-7b": 7.298, "smollm3-3b": 3.075,
    "glm-4-9b": 9.400, "stablelm-2-12b": 12.143, "falcon-7b": 6.922, "smollm2-135m": 0.1345,
}  # fmt: skip
OURS = {"tiny", "deepseek-v3-64-experts"}  # cut by us


@pytest.mark.parametrize("name", BILLIONS)
def test_geometries_have_the_published_numbers_of_parameters(name: str) -> None:
    assert parameters(find_model(name)) / 1e9 == pytest.approx(BILLIONS[name], abs=0.0006)


def test_all_geometries_are_counted() -> None:
    assert set(BILLIONS) == set(GEOMETRIES) - OURS


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_builds(name: str) -> None:
    model = replace(find_model(name), config=shrink(GEOMETRIES[name].config()))
    base: PreTrainedModel = base_model(model, JOB)
    assert not any(one.is_meta for one in (*base.parameters(), *base.buffers()))
    assert {one.dtype for one in base.parameters()} == {torch.bfloat16}
    frequencies = {b.dtype for n, b in base.named_buffers() if n.endswith("inv_freq")}
    assert frequencies == {torch.float32}
    head: Any = base.get_output_embeddings()
    tied = head.weight is base.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert base(**batch(JOB, model.config.vocab_size), use_cache=False).loss.isfinite()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_four_layers_of_each(name: str) -> None:
    """What the named families are measured with."""
    layers = 2 if name == "tiny" else 4
    whole, cut = find_model(name), find_model(name, layers)
    assert cut.config.num_hidden_layers == layers
    assert layers == 2 or parameters(cut) < parameters(whole)


def test_fewer_layers_cut_their_lists_too() -> None:
    config = find_model("gemma-2-9b", 3).config
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_lists_that_name_layers_are_told_from_those_of_each_layer() -> None:
    assert find_model("smollm3-3b", 4).config.no_rope_layers == [1, 1, 1, 0]
    assert find_model("qwen3-30b-a3b", 4).config.mlp_only_layers == []
    config = find_model("qwen3-30b-a3b").config
    config.mlp_only_layers = [1, 3, 40]
    keep_layers(config, 3)
    assert config.mlp_only_layers == [1]


def test_each_config_is_a_new_one() -> None:
    find_model("olmo-3-7b", 1)
    assert len(find_model("olmo-3-7b").config.layer_types) == 32


def test_names_with_commas_between(tmp_path: Path) -> None:
    assert model_names("tiny, llama-3.1-8b,tiny") == ["tiny", "llama-3.1-8b"]
    named = model_names(NAMED_FAMILIES)
    assert model_names(f"tiny,{NAMED_FAMILIES},qwen3-8b") == ["tiny", *named]
    assert model_names(f"{NAMED_FAMILIES},-{named[1]}") == [named[0], *named[2:]]
    for asked, message in (("tiny,-qwen3-8b", "no qwen3-8b to leave out"), ("tiny,-tiny", "names")):
        with pytest.raises(FuseConfigError, match=message):
            model_names(asked)
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert model_names(str(folder)) == [str(folder)]


def test_the_named_families_are_the_readmes() -> None:
    """But for those that another geometry stands for: the same blocks in another size or mix."""
    kinds = {GEOMETRIES[name].config().model_type for name in model_names(NAMED_FAMILIES)}
    assert kinds <= set(NAMED.values())
    assert set(NAMED.values()) - kinds == {"ministral3", "phimoe", "cohere", "glm"}
    families = [one.family for one in GEOMETRIES.values() if one.family]
    assert len(families) == len(set(families))


def test_every_geometry_is_in_the_help() -> None:
    help_text = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "1000"}).output
    assert all(name in help_text for name in (*GEOMETRIES, NAMED_FAMILIES))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_planner_answers_or_says_why_not(name: str) -> None:
    """It predicts layers that are fused whole, and never those with experts."""
    result = CliRunner().invoke(app, ["plan", name, "--layers", "2"])
    config = GEOMETRIES[name].config()
    experts = any("experts_per_tok" in key for key in vars(config))
    if result.exit_code:
        assert "which is not fused as a whole, and `lorafuse plan` predicts only" in result.stderr
    else:
        assert not experts and "≈ stock, checkpointing" in result.stdout
