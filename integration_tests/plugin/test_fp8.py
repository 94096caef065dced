"""`fused_fp8`: never on by itself, and the report says what computes in FP8, how well, and why not.

Where no GPU can multiply FP8, the codes are multiplied in fp32.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafuse import FuseConfig, fuse
from lorafuse.kernels import fp8_linear
from lorafuse.plugin.axolotl_yaml import check
from lorafuse.plugin.errors import FuseConfigError, FuseError

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
LINEARS = 14  # of two layers


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_linear, "unavailable", lambda device: None)
    monkeypatch.setattr(fp8_linear, "MIN_ROWS", 16)


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def fp8_notes(report: Any) -> list[str]:
    return [note for note in report.notes if note.startswith("fp8")]


def test_nothing_turns_it_on_but_its_own_flag() -> None:
    assert not FuseConfig().fused_fp8
    assert not FuseConfig(fused_lora_mlp=True).fused_fp8
    config = FuseConfig.from_yaml({"fused": True})
    assert config is not None and not config.fused_fp8
    assert FuseConfig(fused_fp8=True).enabled() == FuseConfig().enabled()
    config = FuseConfig.from_yaml({"fused": True, "fused_fp8": True})
    assert config is not None and config.fused_fp8 and config.enabled() == FuseConfig().enabled()
    config = check({"fused_lora_o": True, "fused_fp8": True})
    assert config is not None and config.fused_fp8 and not config.fused_lora_mlp


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fused_fp8": True}, "`fused_fp8: true` has no effect, for no operation is asked for"),
        ({"fused_fp8": "e4m3", "fused": True}, "use true or false"),
        ({"fused_fp8": 1, "fused": True}, "use true or false"),
        (
            {"fused_fp8": True, "fused_rope": True},
            "`fused_fp8: true` has no effect without fused_lora_mlp, fused_lora_qkv or "
            "fused_lora_o",
        ),
        ({"fused_pf8": True, "fused": True}, "did you mean `fused_fp8`?"),
    ],
)
def test_wrong_flags(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FuseConfigError) as error:
        FuseConfig.from_yaml(settings)
    assert message in str(error.value)


def test_it_is_off_by_default(llama, emulated) -> None:
    report = fuse(llama.bfloat16())
    step(llama)
    assert "fp8" not in report.operations() and not fp8_notes(report)
    assert report.to_dict()["fp8_noise"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_the_report_says_why_and_strict_is_an_error(llama) -> None:
    report = fuse(llama, fused_fp8=True)
    one = report.operations()["fp8"]
    assert (one.asked, one.found, one.fused) == (True, LINEARS, 0)
    (reason,) = one.fallbacks
    assert reason.reason.startswith("FP8 needs an NVIDIA GPU of compute capability 8.9 or newer")
    (note,) = fp8_notes(report)
    assert note.startswith("fp8: no layer computes in FP8: FP8 needs an NVIDIA GPU")
    assert report.operations()["lora_mlp"].fused == 2
    report.unfuse()
    with pytest.raises(FuseError) as error:
        fuse(llama, fused_fp8=True, fused_strict=True)
    assert "fused_fp8: FP8 needs an NVIDIA GPU" in str(error.value)
    assert "Switch these flags off" in str(error.value) and "FP8: in bf16" in str(error.value)


def test_the_base_computes_in_fp8_and_the_report_counts_it(llama, emulated) -> None:
    llama.bfloat16()
    reference, exact = copy.deepcopy(llama).float(), {}
    loss, exact = step(reference)
    fuse(llama)
    plain, _ = step(llama)
    report = fuse(llama, fused_fp8=True, fused_strict=True)
    one = report.operations()["fp8"]
    assert (one.asked, one.found, one.fused, one.called) == (True, LINEARS, LINEARS, 0)
    fp8_loss, gradients = step(llama)
    one = report.operations()["fp8"]
    assert (one.called, one.calls) == (LINEARS, LINEARS) and not one.runtime_fallbacks
    report.check_called()
    assert fp8_loss != plain and abs(fp8_loss - loss) < 0.02
    for name, gradient in gradients.items():
        error = (gradient.float() - exact[name]).norm() / exact[name].norm()
        assert error < 0.25, (name, error)
    report.unfuse()
    stock = copy.deepcopy(llama)
    assert torch.equal(step(llama)[0], step(stock)[0])


def test_the_report_states_the_noise(llama, emulated) -> None:
    report = fuse(llama.bfloat16(), fused_fp8=True)
    (note,) = fp8_notes(report)
    assert f"the base GEMMs of {LINEARS} linear layers compute in FP8" in note
    assert "proven the fused blocks without it" in note and "dB at worst (" in note
    noise = report.to_dict()["fp8_noise"]
    assert 25 < noise["worst_db"] <= noise["median_db"] < 35
    assert noise["worst"].startswith("base_model.model.model.layers.")
    assert noise["worst"].endswith(("forward", "backward"))
    first = "base_model.model.model.layers.0"
    assert set(noise["first_layer"]) == {
        f"{first}.self_attn.q_proj",
        f"{first}.self_attn.o_proj",
        f"{first}.mlp.gate_proj",
        f"{first}.mlp.down_proj",
    }
    cells = next(line for line in report.text(200).splitlines() if "fused_fp8" in line)
    assert [c.strip() for c in cells.strip("│").split("│")][1:5] == ["yes", "14", "14", "not yet"]


def test_verification_runs_without_it(llama, emulated, monkeypatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("an FP8 GEMM while a block is proven")

    monkeypatch.setattr("lorafuse.patches.apply.measure_noise", lambda groups: None)
    monkeypatch.setattr(fp8_linear, "forward", never)
    report = fuse(llama.bfloat16(), fused_fp8=True)
    assert report.operations()["lora_mlp"].levels == {"layer": 2}
    with pytest.raises(AssertionError, match="an FP8 GEMM"):
        step(llama)


def test_only_the_operations_that_are_fused(llama, emulated) -> None:
    report = fuse(llama.bfloat16(), fused_lora_mlp=True, fused_fp8=True)
    step(llama)
    one = report.operations()["fp8"]
    assert (one.found, one.called) == (6, 6)
    report = fuse(llama, fused_lora_qkv=True, fused_lora_o=True, fused_fp8=True)
    step(llama)
    one = report.operations()["fp8"]
    assert (one.found, one.called) == (8, 8)


def test_calls_that_cannot_are_counted_with_their_reason(llama, emulated, capfd) -> None:
    """An fp32 model without autocast computes in fp32."""
    report = fuse(llama, fused_fp8=True)
    plain, _ = step(llama)
    one = report.operations()["fp8"]
    assert (one.fused, one.called) == (LINEARS, 0)
    (reason,) = one.runtime_fallbacks
    assert reason.reason == "FP8 stands in for bf16 GEMMs; this one computes in float32"
    assert reason.calls == LINEARS
    report.check_called()
    assert "fused_fp8: every call fell back: FP8 stands in for bf16" in capfd.readouterr().err
    report.config = FuseConfig(fused_fp8=True, fused_strict=True)
    with pytest.raises(FuseError, match="fused_fp8: every call fell back"):
        report.check_called()
    fuse(llama)
    assert torch.equal(step(llama)[0], plain)
    report = fuse(llama, fused_fp8=True)
    with torch.autocast("cpu", torch.bfloat16):
        step(llama)
        assert report.operations()["fp8"].called == LINEARS
        llama(input_ids=IDS[:1, :4])
    (few,) = report.operations()["fp8"].runtime_fallbacks
    assert few.reason.startswith("fewer than 16 tokens") and few.calls == LINEARS


def test_models_without_anything_for_it(bare_llama, gpt2, emulated) -> None:
    for model, reason in (
        (bare_llama, "the model has no LoRA adapters"),
        (gpt2, "no module of lora_mlp, lora_qkv or lora_o is fused"),
    ):
        (fallback,) = fuse(model, fused_fp8=True).operations()["fp8"].fallbacks
        assert str(fallback).startswith(reason)
    copied = nn.DataParallel(gpt2)
    copied.device_ids = [0, 1]
    (fallback,) = fuse(copied, fused_fp8=True).operations()["fp8"].fallbacks
    assert str(fallback).startswith("DataParallel copies")
