"""The sweep over transformers' families: a sample here, all of it with LORAFUSE_ALL_FAMILIES=1."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from lorafuse.patches.label_places import LabelPlaces
from lorafuse.plugin import families as sweeping
from lorafuse.plugin.cli import app
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.families import KINDS, Families, model_types, sweep
from lorafuse.plugin.family_table import IMAGES, coverage, markdown, summary
from lorafuse.plugin.family_trial import (
    CRASHED,
    IMAGE_TEXT,
    LAYER,
    LEVELS,
    NOT_BUILT,
    PARTS,
    STOCK,
    WRONG,
    Family,
    try_family,
)

ROOT = Path(__file__).parents[2]
# Each for a way of its own: norms behind, one projection for q/k/v, biases, experts, latent
# attention, complex RoPE and in-place adds, in-place clamps, layer norms, convolutions, no blocks.
SAMPLE = {
    "llama": LAYER,
    "gemma2": LAYER,
    "phi3": LAYER,
    "lfm2": LAYER,
    "mixtral": PARTS,
    "qwen3_moe": PARTS,
    "deepseek_v3": PARTS,
    "llama4_text": PARTS,
    "olmo": PARTS,
    "cohere": PARTS,
    "mamba": PARTS,
    "bert": PARTS,
    "gpt2": STOCK,
    "gemma4_assistant": NOT_BUILT,
}
# Those of images and text that are known best, and some for a way of their own: attention to an
# encoder (florence2), an image in every row (blip), none at all (mistral4).
IMAGE_SAMPLE = {
    "blip": PARTS,
    "florence2": PARTS,
    "gemma3": LAYER,
    "idefics3": LAYER,
    "internvl": LAYER,
    "llava": LAYER,
    "llava_next": LAYER,
    "mistral3": LAYER,
    "mistral4": NOT_BUILT,
    "mllama": PARTS,
    "paligemma": LAYER,
    "qwen2_5_vl": LAYER,
    "qwen2_vl": LAYER,
    "qwen3_vl": LAYER,
    "smolvlm": LAYER,
}
BOUND = 0.95


@pytest.fixture(scope="module")
def sample() -> Families:
    return sweep(model_types(",".join(SAMPLE), "causal"), jobs=2)


def test_the_sample_is_fused_as_far_as_it_was(sample: Families) -> None:
    assert {f.model_type: f.level for f in sample.families} == SAMPLE, [
        (f.model_type, f.level, f.reason) for f in sample.families
    ]


def test_padded_rows_are_tried(sample: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(f.padded for f in sample.families if f.level != NOT_BUILT)
    # Attention that takes padding for nobody's, whoever has labels on it, is found out.
    monkeypatch.setattr(LabelPlaces, "predicts", lambda self, like: None)
    found = try_family("llama", "LlamaForCausalLM", "AutoModelForCausalLM")
    assert found.level == WRONG and "differs by" in found.reason, found


@pytest.fixture(scope="module")
def image_sample() -> Families:
    return sweep(model_types(",".join(IMAGE_SAMPLE), "image-text"), jobs=2)


def test_the_sample_with_images_is_fused_as_far_as_it_was(image_sample: Families) -> None:
    assert {f.model_type: f.level for f in image_sample.families} == IMAGE_SAMPLE, [
        (f.model_type, f.level, f.reason) for f in image_sample.families
    ]
    found = {f.model_type: f for f in image_sample.families}
    assert all(f.images for f in found.values())
    for name in set(IMAGE_SAMPLE) - {"blip", "mistral4"}:
        assert not found[name].text_alone, found[name]
    assert "pixel_values" in found["blip"].text_alone


def test_vision_towers_of_the_sample_are_fused(image_sample: Families) -> None:
    found = {f.model_type: f for f in image_sample.families}
    assert found["mistral3"].vision_layers == (4, 4)  # Pixtral's
    assert found["mllama"].whole_layers == 2  # the others attend to the image
    for name in set(IMAGE_SAMPLE) - {"mistral4"}:
        fused, offered = found[name].vision["lora_qkv"]
        assert fused == offered > 0, found[name]
    for name in ("qwen2_5_vl", "mistral3"):
        assert found[name].vision["lora_mlp"][0] == found[name].vision["lora_mlp"][1] > 0


def test_every_fused_operation_of_the_sample_was_called(sample: Families) -> None:
    found = {f.model_type: f for f in sample.families}
    assert found["llama"].fused["lora_mlp"] == (4, 4)
    assert found["llama"].whole_layers == found["llama"].layers == 4
    for name in ("mixtral", "qwen3_moe", "cohere"):
        assert {"lora_qkv", "lora_o", "rope"} <= set(found[name].operations), found[name]
    for name, count in (("mixtral", 4), ("qwen3_moe", 4), ("deepseek_v3", 3), ("llama4_text", 0)):
        assert found[name].fused["moe"][0] == count, found[name]
    for name in ("deepseek_v3", "olmo", "llama4_text"):
        assert {"lora_mlp", "lora_qkv", "lora_o"} <= set(found[name].operations), found[name]
    assert all(f.reason for f in sample.families if f.level != LAYER)


@pytest.mark.skipif(
    not os.environ.get("LORAFUSE_ALL_FAMILIES"), reason="minutes; set LORAFUSE_ALL_FAMILIES=1"
)
def test_no_family_trains_wrong_or_crashes() -> None:
    found = sweep(model_types(), jobs=2)
    assert not found.bad, [(f.model_type, f.level, f.reason) for f in found.bad]
    assert len(found.covered) >= BOUND * len(found.expected), coverage(found)


def test_the_committed_table_keeps_the_bounds() -> None:
    page = (ROOT / "FAMILIES.md").read_text(encoding="utf-8")
    text, images = page.split(IMAGES)
    image_levels = {row[0].removeprefix("| "): row[2] for row in table_rows(images)}
    assert set(image_levels.values()) <= set(LEVELS) - {"wrong", CRASHED}
    assert len(image_levels) > 80
    assert {n: image_levels[n] for n in IMAGE_SAMPLE} == IMAGE_SAMPLE
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for level in (LAYER, PARTS, STOCK, NOT_BUILT):
        count = list(image_levels.values()).count(level)
        assert f"| {level} | {count} |" in images
        assert f"{count} {level}" in readme or not count
    levels = [row[2] for row in table_rows(text)]
    assert set(levels) <= set(LEVELS) and len(levels) > 150
    assert not {"wrong", CRASHED} & set(levels)
    expected, covered = map(
        int, re.findall(r"Of the (\d+) families .* attention, (\d+) fuse", text)[0]
    )
    assert covered >= BOUND * expected
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for level in (LAYER, PARTS, STOCK, NOT_BUILT):
        assert f"| {level} | {levels.count(level)} |" in text
        assert f"{levels.count(level)} {level}" in readme


def table_rows(text: str) -> list[list[str]]:
    rows = [line.split(" | ") for line in text.splitlines() if line.count(" | ") > 8]
    return rows[1:]


def hang(*_: object) -> Family:
    time.sleep(60)
    raise AssertionError


def hang_when_fused(_a: str, _b: str, _c: str, built: Callable[[], None]) -> Family:
    built()
    return hang()


def die_when_fused(_a: str, _b: str, _c: str, built: Callable[[], None]) -> Family:
    built()
    os._exit(11)


def die(*_: object) -> Family:
    os._exit(11)


@pytest.mark.parametrize(
    ("trial", "level", "reason"),
    [
        (hang, NOT_BUILT, "it took longer than 1 s"),
        (hang_when_fused, CRASHED, "it took longer than 1 s"),
        (die, NOT_BUILT, "its process ended with code 11"),
        (die_when_fused, CRASHED, "its process ended with code 11"),
    ],
)
def test_a_family_that_hangs_or_dies_costs_itself_alone(
    trial: Callable[..., Family], level: str, reason: str
) -> None:
    entries = [("one", "OneForCausalLM", ""), ("two", "TwoForCausalLM", "")]
    found = sweep(entries, jobs=2, limit_s=1, trial=trial)
    assert [(f.model_type, f.level, f.reason) for f in found.families] == [
        ("one", level, reason),
        ("two", level, reason),
    ]


def test_names_are_model_types_or_classes() -> None:
    named = [name for name, _, _ in model_types("LlamaForCausalLM,qwen3")]
    assert {"llama", "qwen3"} <= set(named)  # of one class there may be several model types
    assert [entry[2] for entry in model_types("gemma3")] == list(KINDS.values())
    assert [entry[2] for entry in model_types("gemma3", "image-text")] == [IMAGE_TEXT]
    assert len(model_types()) >= 250
    with pytest.raises(FuseConfigError, match="no such model type"):
        model_types("llamma")
    with pytest.raises(FuseConfigError, match="--kind audio"):
        model_types(kind="audio")


def test_the_command_writes_its_files_and_fails_for_a_bad_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = [
        Family("good", "GoodForCausalLM", LAYER, fused={"lora_mlp": (4, 4)}, layers=4),
        Family("bad", "BadForCausalLM", "wrong", "loss differs by 1e-1 | from stock"),
    ]

    def fake(entries: object, *_: object) -> Families:
        return Families(families, sweeping.datetime.now(sweeping.UTC))

    monkeypatch.setattr(sweeping, "sweep", fake)
    page, data = tmp_path / "page.md", tmp_path / "all.json"
    result = CliRunner().invoke(
        app, ["families", "--only", "llama", "--markdown", str(page), "--json", str(data)]
    )
    assert result.exit_code == 1, result.output
    assert "bad wrong: loss differs" in result.output
    assert "| bad | BadForCausalLM | wrong |" in page.read_text("utf-8")
    assert '"level": "wrong"' in data.read_text("utf-8")
    families.pop()
    assert CliRunner().invoke(app, ["families", "--only", "llama"]).exit_code == 0
    assert CliRunner().invoke(app, ["families", "--only", "llamma"]).exit_code == 1
    assert CliRunner().invoke(app, ["families", "--kind", "audio"]).exit_code == 1


def test_one_mapping_tried_leaves_the_other_part_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    when = sweeping.datetime.now(sweeping.UTC)
    text = Family("words", "WordsForCausalLM", LAYER, layers=4, whole_layers=4)
    seen = Family("seen", "SeenForConditionalGeneration", PARTS, images=True, layers=4)
    page = tmp_path / "page.md"
    for kind, family in (("causal", text), ("image-text", seen), ("causal", text)):
        monkeypatch.setattr(sweeping, "sweep", lambda *_, f=family: Families([f], when))
        result = CliRunner().invoke(app, ["families", "--kind", kind, "--markdown", str(page)])
        assert result.exit_code == 0, result.output
    written = page.read_text("utf-8")
    assert written == markdown(Families([text, seen], when))
    assert written.index("| words |") < written.index(IMAGES) < written.index("| seen |")


def test_the_page_names_versions_and_counts(sample: Families) -> None:
    page = markdown(sample)
    assert transformers.__version__ in page
    assert summary(sample).startswith(f"{len(SAMPLE)} families: 4 layer, 8 parts")
    assert f"| {LAYER} | 4 |" in page
