"""The example package of a third party: installed, found by its entry point, proven and fused."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafuse import fuse
from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.family_trial import largest_error, one_step, tiny_model
from lorafuse.plugin.manager import Plugins
from lorafuse.plugin.tiny_config import TEXT_WORDS, tiny_config

EXAMPLE = Path(__file__).parents[2] / "example_configs" / "thirdparty_structure"
MODULE = "lorafuse_cpmant"
TOKENS = torch.randint(3, TEXT_WORDS, (2, 20), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
BLOCKS = ("lora_mlp", "lora_qkv", "lora_o")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed by pip from a copy of its folder."""
    folder = tmp_path_factory.mktemp("thirdparty")
    source, target = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop(MODULE, None)


def cpmant() -> Any:
    return tiny_model(tiny_config("cpmant"), "AutoModelForCausalLM")


def test_it_is_one_file_and_is_found_by_its_entry_point(installed: None) -> None:
    assert [file.name for file in EXAMPLE.glob("*.py")] == [f"{MODULE}.py"]
    plugins = Plugins(FuseConfig())
    assert plugins.third_parties == ["'cpmant' of lorafuse-cpmant 0.1.0"]
    first, second, *ours = plugins.contributions("lorafuse_structures")
    assert {first.__module__, second.__module__} == {MODULE} and len(ours) >= 5


def test_without_it_the_blocks_are_stock() -> None:
    operations = fuse(cpmant()).operations()
    assert not any(operations[name].fused for name in BLOCKS)


def test_with_it_they_are_fused_and_train_as_stock(installed: None) -> None:
    model = cpmant()
    stock = one_step(model, BATCH)
    report = fuse(model)
    error, where = largest_error(one_step(model, BATCH), stock)
    assert error < 1e-4, where
    operations = report.operations()
    for name in BLOCKS:
        one = operations[name]
        assert one.fused == one.called == one.found == 4, (name, one)
    assert report.proofs >= 3
    report.unfuse()
    error, _ = largest_error(one_step(model, BATCH), stock)
    assert error == 0


def test_switched_off_it_is_not_loaded(installed: None) -> None:
    report = fuse(cpmant(), fused_plugins=False)
    assert MODULE not in sys.modules and not report.operations()["lora_mlp"].fused


def test_a_wrong_reading_is_rejected_by_verification(installed: None) -> None:
    """Another model under the same names, whose MLP gates with the other projection."""
    model = cpmant()

    def crossed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.w_0(x) * self.act(self.w_1(x))

    gated = [m for m in model.modules() if type(m).__name__ == "CpmAntDenseGatedACT"]
    kind = type("Crossed", (type(gated[0]),), {"forward": crossed})
    for module in gated:
        module.__class__ = kind
    stock = one_step(model, BATCH)
    report = fuse(model)
    error, where = largest_error(one_step(model, BATCH), stock)
    assert error < 1e-4, where
    (reason,) = report.operations()["lora_mlp"].fallbacks
    assert "verification" in reason.reason and reason.modules == 4
    assert report.operations()["lora_qkv"].called == 4


def test_falcons_own_linear_layers_are_fused_by_our_own_code() -> None:
    """A subclass of nn.Linear with a forward of its own, which computes the same."""
    model = tiny_model(tiny_config("falcon"), "AutoModelForCausalLM")
    assert any(
        type(m).forward is not nn.Linear.forward
        for m in model.modules()
        if isinstance(m, nn.Linear)
    )
    stock = one_step(model, BATCH)
    report = fuse(model)
    error, where = largest_error(one_step(model, BATCH), stock)
    assert error < 1e-4, where
    for name in ("lora_qkv", "lora_o"):
        assert report.operations()[name].called == report.operations()[name].found > 0
