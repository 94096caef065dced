"""`lorafuse bench`: real worker processes on the CPU, and what becomes of their results."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner, Result

from lorafuse.patches.layer_graphs import WARM
from lorafuse.plugin import bench, bench_plot
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model, batch, parameters
from lorafuse.plugin.bench_plot import plot
from lorafuse.plugin.bench_processes import AHEAD, Workers
from lorafuse.plugin.bench_results import Results, SystemResult, to_dict
from lorafuse.plugin.bench_table import lines_below, profiles, table
from lorafuse.plugin.bench_worker import WARM_UP, busy, is_out_of_memory, warm_up, work
from lorafuse.plugin.cli import app
from lorafuse.plugin.config import OPERATIONS, PREFIX
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometries import find_model
from lorafuse.plugin.geometry_table import GEOMETRIES
from lorafuse.plugin.sketch import shrink

SMALL = ("--device", "cpu", "--tokens", "32", "--rank", "4", "--steps", "2", "--rounds", "1")
JOB = Job(
    system="stock",
    model="tiny",
    layers=None,
    quant="none",
    rank=4,
    batch=2,
    tokens=32,
    documents=1,
    checkpointing=False,
    steps=2,
    attention="sdpa",
    device="cpu",
)
PNG = b"\x89PNG\r\n\x1a\n"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_stock_and_fused_train_the_same_curve(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = invoke(*SMALL, "--model", "tiny", "--json", str(file), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "times say nothing about a GPU" in result.stdout
    assert "axolotl: not run: " in result.stdout and "liger: not run: " in result.stdout
    assert "lorafuse: sdpa attention; fused lora_mlp 2/2, lora_qkv 2/2, lora_o" in result.stdout
    assert "2 blocks proven in " in result.stdout and "stock: sdpa attention" in result.stdout
    assert "command: lorafuse bench --model tiny --quant nf4 --rank 4" in result.stdout
    content = json.loads(file.read_text("utf-8"))
    assert list(content["systems"]) == ["stock", "lorafuse"]
    assert set(content["skipped"]) == {"liger", "axolotl"}
    assert content["arguments"]["tokens"] == 32 and content["arguments"]["quant"] == "nf4"
    assert content["parameters"] == parameters(find_model("tiny"))
    assert content["versions"]["torch"] == torch.__version__ and content["gpu"] is None
    for one in content["systems"].values():
        (measured,) = one["rounds"]
        # The first, one more untimed, and the timed ones.
        assert len(measured["losses"]) == len(measured["gradient_norms"]) == WARM_UP + 2
        assert len(measured["step_ms"]) == 2 and min(measured["step_ms"]) > 0
        assert measured["losses"][-1] < measured["losses"][0]
        assert one["tokens_per_s"] == pytest.approx(64e3 / one["step_ms"])
        assert one["first_step_s"] > 0 and one["peak_allocated_GB"] is None
        assert measured["attention"] == "sdpa" and measured["experts"] is None
    stock, fused = content["systems"]["stock"], content["systems"]["lorafuse"]
    assert stock["largest_loss_difference"] == 0
    # bf16's last place at a loss of 6 is 0.03; the mean of 62 tokens' losses is nearer.
    assert fused["largest_loss_difference"] < 1e-2
    assert fused["largest_relative_gradient_norm_difference"] < 2e-2
    assert abs(fused["first_loss_difference"]) <= fused["largest_loss_difference"]
    assert fused["first_gradient_norm_ratio"] == pytest.approx(1, abs=2e-2)
    report = fused["rounds"][0]["report"]
    assert report["steps"] == WARM_UP + 2
    for name in set(OPERATIONS[:-1]) - {"fused_moe"}:  # a dense model
        operation = report["operations"][name.removeprefix(PREFIX)]
        assert operation["called"] == operation["found"] > 0, name
    assert picture.read_bytes().startswith(PNG)


def test_several_models_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense one, one that fails, a mixture of experts; each process but one is started ahead."""
    monkeypatch.setitem(AHEAD, "cpu", 1)
    mixture, broken = tmp_path / "qwen3-30b-a3b", tmp_path / "broken"
    shrink(GEOMETRIES["qwen3-30b-a3b"].config()).save_pretrained(mixture)
    LlamaConfig(vocab_size=2**40, hidden_size=64, num_attention_heads=2).save_pretrained(broken)
    monkeypatch.setattr(bench, "MOST_ON_CPU", 1e20)
    file = tmp_path / "bench.json"
    result = invoke(*SMALL, "--model", f"tiny,{broken},{mixture}", "--quant", "none",
                    "--json", str(file), "--flag", "fused_checkpointing=selective")  # fmt: skip
    assert result.exit_code == 1, result.output
    tiny, failed, experts = json.loads(file.read_text("utf-8"))["models"]
    for one, model, operation in ((tiny, "tiny", "lora_mlp"), (experts, str(mixture), "moe")):
        assert one["arguments"]["model"] == model and list(one["systems"]) == ["stock", "lorafuse"]
        stock, fused = one["systems"].values()
        assert stock["status"] == fused["status"] == "ok"
        assert abs(fused["first_loss_difference"]) < 1e-2
        counts = fused["rounds"][0]["report"]["operations"][operation]
        assert counts["called"] == counts["found"] == 2
    assert stock["rounds"][0]["experts"] == "grouped_mm"
    assert {one["status"] for one in failed["systems"].values()} == {"out of memory"}
    assert "stock: sdpa attention; experts by grouped_mm" in result.stdout
    assert result.stdout.count("torch 2") == 1  # where it ran, once
    assert result.stdout.count("command: lorafuse bench --model") == 3


def test_a_failing_system_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1,
               eos_token_id=1).save_pretrained(folder)  # fmt: skip
    options = ("--model", str(folder), "--quant", "none", "--no-checkpointing")
    result = invoke(*SMALL, *options, "--flag", "fused_strict=true", "--json",
                    str(tmp_path / "b.json"))  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "lorafuse: failed while running the first step: FuseError: fused_strict" in result.stdout
    content = json.loads((tmp_path / "b.json").read_text("utf-8"))
    assert content["systems"]["lorafuse"]["status"] == "failed"
    assert content["systems"]["stock"]["status"] == "ok"
    assert content["arguments"]["flags"] == {"fused_strict": True}


def here(job: Job) -> list[dict[str, Any]]:
    """The events of a worker, in this process."""
    events: list[dict[str, Any]] = []
    work(job, lambda event, **what: events.append({"event": event} | what))
    return events


def test_packed_documents_and_flags() -> None:
    packed = replace(JOB, documents=4, flags={"fused_rope": True, "fused_lora_qkv": True})
    stock, fused = here(packed)[-1], here(replace(packed, system="lorafuse"))[-1]
    assert fused["losses"] == pytest.approx(stock["losses"], abs=1e-2)
    assert fused["gradient_norms"] == pytest.approx(stock["gradient_norms"], rel=2e-2)
    operations = fused["report"]["operations"]
    assert operations["lora_qkv"]["called"] == 2 and not operations["lora_mlp"]["asked"]
    assert "--documents 4 " in packed.command([], 1)
    assert "--flag fused_rope=true" in packed.command([], 1)


def test_padded_rows() -> None:
    padded = replace(JOB, batch=4, padding=0.4)
    stock = here(padded)[-1]
    for flags in ({}, {"fused_padding_free": True}):
        fused = here(replace(padded, system="lorafuse", flags=flags))[-1]
        assert fused["losses"] == pytest.approx(stock["losses"], abs=1e-2)
        assert fused["gradient_norms"] == pytest.approx(stock["gradient_norms"], rel=2e-2)
    assert fused["report"]["operations"]["padding_free"]["called"] == 1
    inputs = batch(padded, 64)
    mask = inputs["attention_mask"]
    assert mask.sum(1).tolist() == [32, 23, 15, 6] and mask.shape == (4, 32)
    assert torch.equal(inputs["labels"] == -100, mask == 0)
    assert "--padding 0.4 " in padded.command([], 1) and "40% of them padding" in padded.describe()


def test_4_bit_prepared_as_peft_does_it() -> None:
    prepared = replace(JOB, quant="nf4", prepare_kbit=True)
    stock, fused = here(prepared)[-1], here(replace(prepared, system="lorafuse"))[-1]
    assert fused["losses"] == pytest.approx(stock["losses"], abs=1e-2)
    assert fused["gradient_norms"] == pytest.approx(stock["gradient_norms"], rel=2e-2)
    assert fused["report"]["operations"]["lora_mlp"]["levels"] == {"layer": 2}
    base = adapted(base_model(find_model("tiny"), prepared), prepared).get_base_model()
    assert {p.dtype for p in base.lm_head.parameters()} == {torch.float32}
    assert stock["losses"] != here(replace(JOB, quant="nf4"))[-1]["losses"]
    assert " --prepare-kbit " in prepared.command([], 1)


def test_out_of_memory_is_a_result(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=2**40, hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path)
    stage, end = here(replace(JOB, model=str(tmp_path)))
    assert (stage["stage"], end["event"]) == ("building the model", "out of memory"), end
    results = make_results(SystemResult("stock", [], end["event"], end["error"], stage["stage"]))
    assert not results.complete
    assert "stock: out of memory while building the model" in list(lines_below(results))


def test_rounds_turn_around_and_leave_out_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def one(workers: Workers, job: Job, result: SystemResult, progress: Any) -> None:
        ran.append((job.system, job.profile))
        progress("step")
        if job.system == "liger":
            result.status = "failed"
        elif job.system == "axolotl":
            result.status, result.error = "unsupported", "no kernels"
        else:
            result.rounds.append(measured(1.0))

    monkeypatch.setattr(bench, "run_worker", one)
    monkeypatch.setattr(bench, "check_machine", lambda job: 1)
    told: list[str] = []
    saved: list[dict[str, Any]] = []
    results = bench.run(
        replace(JOB, profile=3),
        ["stock", "lorafuse", "liger", "axolotl"],
        2,
        {},
        Workers(0, 0),
        lambda label, stage: told.append(f"{label}: {stage}"),
        lambda so_far: saved.append(so_far.to_dict()),
    )
    assert ran == [
        ("stock", 0), ("lorafuse", 0), ("liger", 0), ("axolotl", 0), ("lorafuse", 3), ("stock", 3),
    ]  # fmt: skip
    assert told[-1] == "round 2 of 2, stock: step"
    # A run that is cut short has what was measured until then.
    assert [len(one["systems"]) for one in saved] == [1, 2, 3, 3, 3, 3]
    assert saved[-1]["systems"] == results.to_dict()["systems"]
    assert results.skipped == {"axolotl": "no kernels"} and not results.complete
    assert list(results.systems) == ["stock", "lorafuse", "liger"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "llama-3.1-8B"), "did you mean `llama-3.1-8b`"),
        (("--model", "llama-3.1-8b"), "has 8.03 billion parameters, too many for a CPU"),
        (("--model", "tiny", "--layers", "3"), "the model has 2; give 1 to 2"),
        (("--model", "."), "has no config.json"),
        (("--systems", "stock,unsloth"), "--systems unsloth is unknown"),
        (("--systems", "axolotl"), "--systems axolotl cannot run here: "),
        (("--systems", "stock", "--flag", "fused_rope=true"), "--flag has no effect"),
        (("--model", "tiny", "--flag", "fused_ropes=true"), "did you mean `fused_rope`"),
        (("--model", "tiny", "--flag", "fused_rope"), "write NAME=VALUE"),
        (("--model", "tiny", "--documents", "5"), "give a multiple"),
        (("--model", "tiny", "--documents", "32"), "nothing to predict"),
        (("--model", "tiny", "--batch", "0"), "--batch 0: give 1 or more"),
        (
            ("--model", "tiny", "--padding", "0.5"),
            "--padding 0.5: give a share from 0 to below 0.5",
        ),
        (("--model", "tiny", "--padding", "0.2", "--batch", "1"), "give --batch 2 or more"),
        (("--model", "tiny", "--rounds", "0"), "--rounds 0: give 1 or more"),
        (("--model", "tiny", "--quant", "int8"), "use nf4 or none"),
        (
            ("--model", "tiny", "--quant", "none", "--prepare-kbit"),
            "--prepare-kbit is for 4-bit weights, got --quant none",
        ),
        (("--model", "tiny", "--profile", "9"), "--profile lists a GPU's kernels"),
        (("--model", "tiny", "--plot", "a.pdf"), "the picture is a PNG"),
        (("--model", "tiny,smollm2-135m", "--plot", "a.png"), "--plot draws one model"),
        (("--model", "tiny,named-families"), "--model llama-3.1-8b has 8.03 billion parameters"),
        (("--model", "tiny", "--json", "no/such/a.json"), "there is no folder no/such"),
    ],
)
def test_wrong_settings(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    # What typer takes twice, it takes from the end.
    result = invoke(*SMALL[:-2], *arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_gpu_that_is_not_there() -> None:
    result = invoke("--device", "cuda", "--systems", "stock")
    assert result.exit_code == 1 and "torch sees no CUDA GPU" in result.stderr


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_plot, "find_spec", lambda name: None)
    result = invoke(*SMALL, "--model", "tiny")
    assert "pip install bitsandbytes, or use --quant none" in result.stderr
    result = invoke(*SMALL, "--model", "tiny", "--plot", "a.png")
    assert "pip install 'lorafuse[bench]'" in result.stderr


def test_a_folder_with_weights_is_loaded(tmp_path: Path) -> None:
    saved = base_model(find_model("tiny"), JOB)
    saved.save_pretrained(tmp_path)
    model = find_model(str(tmp_path))
    assert model.weights == tmp_path
    loaded = base_model(model, replace(JOB, model=str(tmp_path)))
    for (name, one), other in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    quantised = base_model(model, replace(JOB, model=str(tmp_path), quant="nf4"))
    quantised.save_pretrained(tmp_path / "4bit")
    with pytest.raises(FuseConfigError, match="are quantised with bitsandbytes"):
        base_model(find_model(str(tmp_path / "4bit")), JOB)


def test_nf4_gets_the_adapters_of_a_real_qlora_run() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from peft.tuners.lora.bnb import Linear4bit

    job = replace(JOB, quant="nf4")
    model: Any = adapted(base_model(find_model("tiny"), job), job)
    layers = model.get_base_model().model.layers
    projection = layers[0].mlp.up_proj
    assert isinstance(projection, Linear4bit)
    assert isinstance(projection.base_layer, bnb.nn.Linear4bit)
    assert projection.base_layer.weight.quant_state.nested
    assert type(model.get_base_model().lm_head) is torch.nn.Linear
    assert projection.lora_B["default"].weight.abs().max() > 0


def test_packing() -> None:
    packed = batch(replace(JOB, documents=4), 64)
    whole = batch(JOB, 64)
    assert torch.equal(packed["input_ids"], whole["input_ids"]) and "position_ids" not in whole
    assert torch.equal(packed["position_ids"][1], torch.arange(8).repeat(4))
    assert (packed["labels"] == -100).sum() == 8
    assert torch.equal(whole["labels"], whole["input_ids"])


def test_packed_documents_do_not_see_each_other() -> None:
    job = replace(JOB, documents=4)
    model = adapted(base_model(find_model("tiny"), job), job).float()
    inputs = batch(job, 512)
    rows = inputs["input_ids"].reshape(-1, 8)
    packed = model(**inputs, use_cache=False).loss
    assert packed.item() == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), rel=1e-6)


def test_transformers_chooses_the_attention() -> None:
    """gpt-oss has sinks, which only eager attention knows."""
    for name, attention in (("gpt-oss-20b", "eager"), ("gemma-2-9b", "sdpa"), ("tiny", "sdpa")):
        model = replace(find_model(name), config=shrink(GEOMETRIES[name].config()))
        for asked in (None, "sdpa"):
            base = base_model(model, replace(JOB, attention=asked))
            assert base.config._attn_implementation == attention
    assert "--attention sdpa --device" in JOB.command([], 1)
    assert "--attention" not in replace(JOB, attention=None).command([], 1)


def test_graphs_are_recorded_before_steps_are_timed() -> None:
    assert warm_up(JOB) == WARM_UP
    assert warm_up(replace(JOB, flags={"fused_graphs": True})) == WARM_UP + WARM


def test_busy_time_counts_overlaps_once() -> None:
    assert busy([(4, 5), (0, 2), (1, 3), (1, 2)]) == 4
    assert busy([]) == 0


def test_out_of_memory_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("a shape"))
    assert not is_out_of_memory(ValueError("out of memory"))


def measured(*step_ms: float, losses: tuple[float, ...] = (2.0, 1.0)) -> dict[str, Any]:
    """What a worker on a GPU answers."""
    kernel = {"name": "gemm", "ms": 6.0, "count": 3}
    return {
        "variant": "",
        "attention": "sdpa",
        "experts": None,
        "images": None,
        "setup_s": 1.0,
        "first_step_s": 2.0,
        "step_ms": list(step_ms),
        "losses": list(losses),
        "gradient_norms": [1.0, 2.0],
        "peak_allocated_GB": 4.0,
        "peak_reserved_GB": 5.0,
        "first_step_peak_allocated_GB": 6.0,
        "profile": {"busy_ms": 8.0, "wall_ms": 15.0, "kernels": [kernel]},
    }


def make_results(*systems: SystemResult) -> Results:
    return Results(
        job=replace(JOB, system="", device="cuda"),
        rounds=2,
        systems={one.name: one for one in systems},
        skipped={},
        parameters=1,
        allocator="A=B",
        date=datetime(2026, 1, 2, tzinfo=UTC),
    )


def test_what_is_made_of_the_rounds(tmp_path: Path) -> None:
    machine = {"gpu": "A GPU", "free_GB": 70.0, "total_GB": 80.0}
    stock = SystemResult("stock", [measured(20, 22), measured(18, 20)], machine=machine)
    fused = measured(10, 10, losses=(2.25, 1.0))
    lorafuse = SystemResult("lorafuse", [measured(10, 11), fused], machine=machine)
    liger = SystemResult("liger", [], "out of memory", "OutOfMemoryError", "step 1 of 2", machine)
    results = make_results(stock, lorafuse, liger)
    assert results.complete and results.gpu == "A GPU"
    one = results.summaries()["lorafuse"]
    assert one["tokens_per_s"] == 6400 and one["ratio"] == 2 and one["first_step_s"] == 3
    assert one["tokens_per_s_of_rounds"] == pytest.approx([64e3 / 10.5, 6400])
    assert one["largest_loss_difference"] == 0.25
    lines = list(lines_below(results))
    assert "liger: out of memory while running step 1 of 2" in lines
    assert any("its first step peaked at 6.0 GB" in line for line in lines)
    assert any("others held up to 10.0 GB" in line for line in lines)
    profile = list(profiles(results))
    assert profile[0].startswith("stock, one step: GPU busy 8.0 ms, idle 12.0 ms of the median")
    assert table(results).row_count == 3
    assert to_dict([results]) == results.to_dict()
    assert to_dict([results, results]) == {"models": [results.to_dict()] * 2}
    plot(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    failed = make_results(stock, SystemResult("lorafuse", [], "failed", "why", ""))
    assert not failed.complete
    assert "lorafuse: failed while starting: why" in list(lines_below(failed))
