"""The README's table of what `lorafuse bench` has measured on the named families."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorafuse.plugin.cli import app
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.family_times import BEGIN, COLUMNS, END, OPERATIONS, block, inserted, read
from lorafuse.plugin.geometries import model_names
from lorafuse.plugin.geometry_table import NAMED_FAMILIES
from lorafuse.plugin.image_geometry_table import NAMED_IMAGE_FAMILIES

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "integration_tests" / "gpu" / "measured" / "families"
README = (ROOT / "README.md").read_text("utf-8")
measured = pytest.mark.skipif(not MEASURED.is_dir(), reason="not measured by `bench` yet")


@measured
def test_the_readme_says_what_was_measured() -> None:
    assert inserted(README, MEASURED) == README, f"run what stands in {BEGIN}"


@measured
def test_each_named_family_was_measured_on_a_gpu_both_ways() -> None:
    found = read(MEASURED)
    text, images = model_names(NAMED_FAMILIES), model_names(NAMED_IMAGE_FAMILIES)
    assert set(found) == {*text, *images}
    for name, pair in found.items():
        assert set(pair) == {True, False}, name
        for one in pair.values():
            assert "H100" in one["gpu"] and set(one["systems"]) == {"stock", "lorafuse"}, name
            fused = one["systems"]["lorafuse"]
            assert fused["status"] == "ok", name
            assert (fused["rounds"][0].get("images") is not None) == (name in images), name


def system(step_ms: float, loss: float = 0.0, ratio: float = 1.0, **more: Any) -> dict[str, Any]:
    """One system's part of a file of `bench --json`, as far as the table reads it."""
    operations = {name: {"called": 0, "found": 0} for name in OPERATIONS}
    operations |= {"lora_mlp": {"called": 4, "found": 4}, "rope": {"called": 0, "found": 4}}
    report = {"operations": operations, "verification": {"blocks": 2, "seconds": 1.25}}
    return {
        "status": "ok", "step_ms": step_ms, "peak_allocated_GB": 2.04, "ratio": 100 / step_ms,
        "first_loss_difference": loss, "first_gradient_norm_ratio": ratio,
        "rounds": [{"attention": "sdpa", "report": report}], **more,
    }  # fmt: skip


def result(model: str, checkpointing: bool, systems: dict[str, Any], **more: Any) -> dict[str, Any]:
    mode = "selective" if checkpointing else False  # a bare `off` in YAML
    arguments = {
        "model": model, "checkpointing": checkpointing, "layers": 4, "quant": "nf4", "rank": 32,
        "batch": 2, "tokens": 4096, "flags": {"fused_checkpointing": mode},
    }  # fmt: skip
    return {
        "arguments": arguments | more, "systems": systems, "gpu": "A GPU",
        "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2", "transformers": "5"},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept = tmp_path / "kept"
    kept.mkdir()
    both = {"stock": system(100), "lorafuse": system(50, 1e-3, 0.99)}
    models = [
        result("qwen3-8b", True, both),
        result("llama-3.1-8b", True, {"stock": system(1)}),
    ]
    (kept / "a.json").write_text(json.dumps({"models": models}), "utf-8")
    both = {"stock": system(100), "lorafuse": system(40, -2e-3, 1.001)}
    (kept / "b.json").write_text(json.dumps(result("qwen3-8b", False, both)), "utf-8")
    memory: dict[str, Any] = {"status": "out of memory", "rounds": []}
    eager = system(50, rounds=[{"attention": "eager"}])
    one = result("gpt-oss-20b", True, {"stock": eager, "lorafuse": memory}, batch=8, tokens=1024)
    (kept / "c.json").write_text(json.dumps(one), "utf-8")
    alone = system(200)
    del alone["ratio"]  # there is nothing to compare with
    ended = {"stock": memory, "lorafuse": alone}
    (kept / "d.json").write_text(json.dumps(result("llama-3.1-8b", True, ended)), "utf-8")
    return kept


def test_rows_of_merged_files(folder: Path) -> None:
    common, nothing, header, line, *rows = block(folder).splitlines()
    assert common == (
        "NF4 (experts in bf16), LoRA r=32, 2 × 4,096 tokens where the row does not say otherwise; "
        "A GPU, torch 2, transformers 5, 2026-01-02."
    )
    assert nothing == "" and header == f"| {' | '.join(COLUMNS)} |"
    assert line.count("---") == len(COLUMNS)
    llama, qwen, gpt = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    # A later file comes first; the order is that of the geometries.
    assert llama[:6] == ["Llama 3.1 8B", "4 of 32", "out of memory", "200, 2.0", "–", "–"]
    fused = ["MLP 4/4, RoPE 0/4", "1.2"]
    assert llama[8:] == ["–", "–", *fused]
    assert qwen == [
        "Qwen3 8B", "4 of 36", "100, 2.0", "50, 2.0", "2.00", "100, 2.0", "40, 2.0", "2.50",
        "-2.0e-03", "0.9900", *fused,
    ]  # fmt: skip
    assert gpt == [
        "gpt-oss 20B, 8 × 1,024, eager attention", "4 of 24", "50, 2.0", "out of memory", *"–" * 8
    ]  # fmt: skip


def test_rows_with_images_stand_last_and_say_so(folder: Path) -> None:
    images = "images of 8 × 8 and 4 × 8 a row (6 of 64 tokens)"
    seen = {"stock": system(100, rounds=[{"attention": "sdpa", "images": images}])}
    name = "llama-3.2-11b-vision"
    (folder / "0.json").write_text(json.dumps(result(name, True, seen, layers=34)), "utf-8")
    common, *_, row = block(folder).splitlines()
    assert row.startswith(f"| Llama 3.2 11B Vision, {images} | 34 of 40 and 32 of 32 | 100, 2.0 |")
    assert "With images: layers of the text tower and of the vision tower" in common


def test_the_command_writes_between_the_marks_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "FAMILIES.md").write_text((ROOT / "FAMILIES.md").read_text("utf-8"), "utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(README, "utf-8")
    arguments = ["families", "--readme", str(readme), "--measured", str(folder)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    text = readme.read_text("utf-8")
    assert f"{BEGIN}\n{block(folder)}\n{END}" in text
    assert text.partition(BEGIN)[0] == README.partition(BEGIN)[0]
    assert text.partition(END)[2] == README.partition(END)[2]


def test_what_the_table_is_not_of(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FuseConfigError, match="holds no results"):
        read(tmp_path)
    with pytest.raises(FuseConfigError, match="has no two lines"):
        inserted("# a README", folder)
    other = result("qwen3-8b", True, {}, flags={})
    (folder / "e.json").write_text(json.dumps(other), "utf-8")
    with pytest.raises(FuseConfigError, match="fused_checkpointing=None; the table is of selectiv"):
        read(folder)
