"""The README's table of named families says what FAMILIES.md says, and what the tests hold."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from lorafuse.plugin.cli import app
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.families import model_types
from lorafuse.plugin.family_readme import BEGIN, END, NAMED, block, inserted, rows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "FAMILIES.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def tested() -> dict[str, list[Any]]:
    """Model type -> the table's entries of `patches/test_named_families.py`."""
    path = ROOT / "integration_tests" / "patches" / "test_named_families.py"
    spec = importlib.util.spec_from_file_location("named_families_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, list[Any]] = {}
    for entry in module.NAMED.values():
        kind = getattr(transformers, f"{entry.config}Config").model_type
        found.setdefault(kind, []).append(entry)
    return found


def test_the_readme_is_of_the_committed_page() -> None:
    assert f"{BEGIN}\n{block(PAGE)}\n{END}" in README, (
        "run `lorafuse families --readme README.md`, or the sweep with --markdown as well"
    )
    assert inserted(README, PAGE) == README


def test_each_named_family_is_one_of_transformers_and_is_trained_in_the_tests() -> None:
    known = {name for name, _, _ in model_types()}
    assert set(NAMED.values()) <= known
    assert set(NAMED.values()) == set(tested())


@pytest.mark.parametrize("model_type", NAMED.values())
def test_the_page_and_the_tests_agree_on_what_is_fused(model_type: str) -> None:
    """The page is of configs as transformers has them, the tests' are the released ones."""
    _, found = rows(PAGE)
    row, entries = found[model_type], tested()[model_type]
    some, of_all = map(int, row["layers"].split("/"))
    assert any((entry.layers > 0) == (some == of_all) for entry in entries), row
    columns = {"MLP": "lora_mlp", "q/k/v": "lora_qkv", "o": "lora_o", "norms": "rms_norm"}
    for column, operation in {**columns, "RoPE": "rope", "loss": "cross_entropy"}.items():
        fused = row[column].strip() not in ("", "–") and not row[column].startswith("0/")
        assert any(bool(entry.fused[operation]) == fused for entry in entries), (column, row)


def test_a_page_without_all_rows_or_a_readme_without_marks_is_an_error(tmp_path: Path) -> None:
    lines = [line for line in PAGE.splitlines() if not line.startswith("| mixtral ")]
    with pytest.raises(FuseConfigError, match="no row for mixtral"):
        block("\n".join(lines))
    with pytest.raises(FuseConfigError, match="has no table of families"):
        block("# nothing")
    with pytest.raises(FuseConfigError, match="has no two lines"):
        inserted("# a README", PAGE)
    lonely = tmp_path / "README.md"
    lonely.write_text(README, "utf-8")
    result = CliRunner().invoke(app, ["families", "--readme", str(lonely)])
    assert result.exit_code == 1 and "FAMILIES.md" in result.output
    assert lonely.read_text("utf-8") == README


def test_the_command_rewrites_what_lies_between_the_marks_only(tmp_path: Path) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "FAMILIES.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", "utf-8")
    changed = PAGE.replace(
        "| llama | LlamaForCausalLM | layer | 4/4 |", "| llama | L | layer | 3/4 |"
    )
    page.write_text(changed, "utf-8")
    result = CliRunner().invoke(app, ["families", "--readme", str(readme)])
    assert result.exit_code == 0, result.output
    text = readme.read_text("utf-8")
    assert text.startswith(f"before\n{BEGIN}\n| family |") and text.endswith(f"\n{END}\nafter\n")
    assert "| Llama 1 to 3.3 | llama | 3/4 |" in text and "old" not in text


def test_a_column_that_the_page_gains_comes_along() -> None:
    """As experts, where the sweep counts them."""
    header = "| family | class | level | layers | MLP | experts | what runs as stock, and why |"
    lines = [header, "|---" * 7 + "|"]
    lines += [f"| {t} | C | parts | 0/4 |  | 4/4 | a \\| b | c |" for t in NAMED.values()]
    table = block("\n".join(lines))
    assert table.splitlines()[0] == "| family | model type | layers | MLP | experts |"
    assert "| Mixtral | mixtral | 0/4 | – | 4/4 |" in table
