"""`FuseReport`: what it says as a dict, a table and a file, and what it counts."""

import json
import os
import stat
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lorafuse import FuseReport, fuse
from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.environment import PACKAGES
from lorafuse.plugin.errors import FuseError

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))


def test_versions_and_gpu(llama) -> None:
    said = fuse(llama).to_dict()
    assert tuple(said["versions"]) == PACKAGES
    for name in ("torch", "transformers", "peft", "lorafuse"):
        assert said["versions"][name] == version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    assert said["gpu"] == gpu


def test_what_is_not_installed_has_no_version() -> None:
    from lorafuse.plugin.environment import _version

    assert _version("a-package-that-nobody-wrote") is None


def test_calls_are_counted_as_they_happen(llama) -> None:
    report = fuse(llama, fused_lora_mlp=True)
    one = report.operations()["lora_mlp"]
    assert (one.asked, one.found, one.fused, one.called, one.calls) == (True, 2, 2, 0, 0)
    assert one.levels == {"part": 2}
    for step in (1, 2):
        llama(input_ids=IDS)
        one = report.operations()["lora_mlp"]
        assert (one.called, one.calls) == (2, 2 * step)
    assert not report.operations()["lora_qkv"].asked
    assert report.operations()["lora_qkv"].found == 0


def test_why_modules_are_not_fused_is_grouped(another_llama, gpt2) -> None:
    (reason,) = fuse(gpt2).operations()["lora_mlp"].fallbacks
    assert (reason.modules, reason.first, reason.calls) == (1, "", 0)
    assert "GPT2LMHeadModel" in str(reason)
    # A forward of somebody else's on one projection of each MLP.
    for name, module in another_llama.named_modules():
        if name.endswith("mlp.up_proj"):
            module.forward = module.forward
    one = fuse(another_llama, fused_lora_mlp=True).operations()["lora_mlp"]
    (reason,) = one.fallbacks
    assert (one.found, one.fused, reason.modules) == (2, 0, 2)
    assert reason.first == "base_model.model.model.layers.0.mlp"
    assert str(reason).endswith("(2 modules, first base_model.model.model.layers.0.mlp)")


def test_calls_that_go_the_stock_way_are_counted_with_their_reason(llama) -> None:
    report = fuse(llama, fused_lora_mlp=True)
    seen: list[int] = []
    handle = llama.base_model.model.model.layers[1].mlp.up_proj.register_forward_hook(
        lambda *_: seen.append(1)
    )
    llama(input_ids=IDS)
    llama(input_ids=IDS)
    handle.remove()
    assert len(seen) == 2
    one = report.operations()["lora_mlp"]
    assert (one.fused, one.called, one.calls) == (2, 1, 2)
    (reason,) = one.runtime_fallbacks
    assert (reason.modules, reason.calls) == (1, 2)
    assert reason.first == "base_model.model.model.layers.1.mlp"
    assert f"{reason}: 2 calls" in " ".join(report.text(width=400).split())
    report.check_called()  # the other module has run


def test_what_was_never_called_is_an_error_if_strict_else_a_warning(llama, capfd) -> None:
    report = fuse(llama, fused_rope=True, fused_lora_qkv=True, fused_lora_o=True)
    llama.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    llama.base_model.model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    llama(input_ids=IDS)
    report.check_called()
    warned = capfd.readouterr().err
    assert "fused_rope: every call fell back: a hook on" in warned
    report.config = FuseConfig(fused_strict=True)
    with pytest.raises(FuseError, match="fused_lora_qkv: every call fell back"):
        report.check_called()


def test_an_operation_that_nobody_calls_is_named(llama) -> None:
    report = fuse(llama, fused_lora_mlp=True, fused_strict=True)
    with pytest.raises(FuseError, match="fused in 2 modules, but none of them was called"):
        report.check_called()


def rows(report: FuseReport) -> dict[str, list[str]]:
    lines = [line for line in report.text(width=200).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {one[0]: one[1:] for one in cells}


def test_the_table_has_a_row_for_each_operation(llama, gpt2) -> None:
    report = fuse(llama, fused_lora_mlp=True, fused_rms_norm=True)
    table = rows(report)
    assert list(table) == [f"fused_{name}" for name in report.config.enabled()]
    assert table["fused_lora_mlp"] == ["yes", "2", "2", "not yet", "part", ""]
    assert table["fused_rope"] == ["no", "", "", "", "", ""]
    llama(input_ids=IDS)
    assert rows(report)["fused_lora_mlp"][3] == "2"
    assert rows(report)["fused_rms_norm"][3] == "5"
    stock = rows(fuse(gpt2))["fused_lora_mlp"]
    assert stock[:4] == ["yes", "0", "0", "not yet"]
    assert stock[5].startswith("no gated MLP")


def test_the_text_shows_notes_and_where_it_ran(llama) -> None:
    text = fuse(llama).text()
    assert f"lorafuse {version('lorafuse')}, before the first step" in text
    assert ("CPU" in text.splitlines()[0]) == (not torch.cuda.is_available())
    if not torch.cuda.is_available():
        assert "note: attention: the backend is left to torch" in text


def test_the_file_says_what_the_dict_says(llama, tmp_path) -> None:
    report = fuse(llama)
    llama(input_ids=IDS)
    path = report.to_json(tmp_path / "new" / "folder" / "report.json")
    assert json.loads(path.read_text("utf-8")) == json.loads(json.dumps(report.to_dict()))
    assert json.loads(path.read_text("utf-8"))["config"]["fused_attention"] == "auto"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(path.parent) == ["report.json"]


def test_a_failed_write_leaves_the_old_file_whole(llama, tmp_path) -> None:
    report = fuse(llama)
    path = report.to_json(tmp_path / "report.json")
    before = path.read_text("utf-8")
    report.notes.append(Path("no plain type"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not JSON serializable"):
        report.to_json(path)
    assert path.read_text("utf-8") == before
    assert os.listdir(tmp_path) == ["report.json"]
