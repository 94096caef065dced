"""torch.compile around a fused model: what is fused runs as without, at run time, in each step."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig

from lorafuse.patches.apply import OPERATIONS, FusedModel, apply
from lorafuse.patches.attention import CAUSAL, DOCUMENTS, MASK

from .conftest import SMALL

ALL = dict.fromkeys(OPERATIONS, True)
# Without RoPE no layer is fused whole, and no attention as a block; what is left around the parts
# is compiled.
PARTS = ALL | {"rope": False}
STOCK_LOSS = {"cross_entropy": False}

Step = Callable[..., dict[str, Tensor]]


@pytest.fixture(autouse=True)
def compiles_anew(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING, "torch.__trace")  # pytest would format all that is traced
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make(make_peft) -> Callable[..., Any]:
    """As `make_peft`, of Mixtral too."""

    def made(family: str, **options: Any) -> Any:
        if family != "mixtral":
            return make_peft(family, **options)
        config = MixtralConfig(**SMALL, num_local_experts=4, experts_implementation="eager")
        return make_peft(config, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **options)

    return made


@pytest.fixture
def step(tokens) -> Step:
    """Loss and gradients of `model`, called through what torch.compile has made of it."""

    def run(model: nn.Module, compiled: Any = None, ids: Tensor = tokens, **kwargs: Any) -> Any:
        model.zero_grad()
        torch.manual_seed(7)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False} | kwargs
        loss = (model if compiled is None else compiled)(**inputs).loss
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    return run


def calls(fused: FusedModel) -> dict[tuple[str, str], int]:
    return {(r.operation, getattr(r, "module", "")): r.calls for r in fused.records if r.fused}


def stock_calls(fused: FusedModel) -> dict[str, int]:
    return {why: n for r in fused.records for why, n in r.stock_calls.items()}


@pytest.mark.parametrize(
    ("family", "operations", "backend"),
    [
        ("llama", ALL, "aot_eager"),
        ("qwen3", ALL, "eager"),
        ("gemma2", ALL, "eager"),
        ("phi3", ALL | STOCK_LOSS, "eager"),
        ("mixtral", ALL, "aot_eager"),
        ("llama", PARTS | STOCK_LOSS, "aot_eager"),
        ("phi3", PARTS, "eager"),
    ],
)
def test_two_steps_are_those_without_compile(
    family, operations, backend, make, step, close
) -> None:
    model = make(family)
    stock = step(model)
    fused = apply(model, operations)
    eager = step(model)
    once = calls(fused)
    assert once and all(once.values())
    whole = operations["rope"] and family != "mixtral"
    assert whole == any(r.level == "layer" for r in fused.records)
    compiled = torch.compile(model, backend=backend)
    for count in (2, 3):
        ours = step(model, compiled)
        close(ours, eager, 1e-5)
        close(ours, stock)
        assert calls(fused) == {key: count * n for key, n in once.items()}
    assert not stock_calls(fused)


def test_batches_of_other_shapes_packed_rows_and_dropout(make, step, close, device) -> None:
    model = make("llama", lora_dropout=0.2)
    batches: list[dict[str, Any]] = []
    for rows, length in ((2, 20), (1, 13), (3, 17)):
        ids = torch.randint(3, 128, (rows, length), device=device)
        positions = torch.arange(length, device=device).expand(rows, -1)
        batches.append({"ids": ids, "position_ids": positions % 7})
    batches.append({"ids": ids, "attention_mask": torch.ones_like(ids)})
    fused = apply(model, ALL)
    eager = [step(model, **batch) for batch in batches]
    once = calls(fused)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for batch, exact in zip(batches, eager, strict=True):
        close(step(model, compiled, **batch), exact, 1e-5)
    assert calls(fused) == {key: 2 * n for key, n in once.items()}
    # A mask of ones is dense where transformers is traced; here it is read for what it says.
    # (A GPU's attention within documents is for 16 bit.)
    packed = DOCUMENTS if device.type == "cpu" else MASK
    assert fused.masks() == {packed: 12, CAUSAL: 2}


def test_gradients_accumulate_over_batches(make, tokens, close) -> None:
    model = make("llama")
    fused = apply(model, ALL)

    def accumulated(called: Any) -> dict[str, Tensor]:
        model.zero_grad()
        losses = [
            called(input_ids=ids, labels=ids, use_cache=False).loss
            for ids in (tokens, tokens[:1, :15], tokens.flip(1))
        ]  # all of them forward, then all of them backward
        for loss in losses:
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    eager = accumulated(model)
    once = calls(fused)
    close(accumulated(torch.compile(model, backend="eager")), eager, 1e-5)
    assert calls(fused) == {key: 2 * n for key, n in once.items()}


@pytest.mark.parametrize("mode", ["selective", "offload"])
def test_layers_that_keep_less(mode, make, step, close) -> None:
    model = make("llama")
    exact = step(model)
    fused = apply(model, ALL, checkpointing=mode)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        close(step(model, compiled), exact)
    kept = {r.level: r.calls for r in fused.records if r.operation == "checkpointing"}
    assert sum(kept.values()) == 2


@pytest.mark.parametrize("operations", [ALL, PARTS], ids=["whole", "parts"])
def test_the_trainers_checkpointing_may_be_on(operations, make, step, close) -> None:
    model = make("llama", lora_dropout=0.2)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fused = apply(model, operations)
    eager = step(model)
    once = calls(fused)
    close(step(model, torch.compile(model, backend="eager")), eager, 1e-5)
    assert calls(fused) == {key: 2 * n for key, n in once.items()}


def test_fusing_and_unfusing_what_is_compiled_already(make, step, close) -> None:
    model = make("qwen3")
    compiled = torch.compile(model, backend="eager")
    stock = step(model, compiled)
    for operations in (ALL | STOCK_LOSS, ALL):
        fused = apply(model, operations)
        close(step(model, compiled), stock)
        once = calls(fused)
        assert once and all(once.values())
        fused.unfuse()
        close(step(model, compiled), stock, 1e-5)
        assert calls(fused) == once


def test_each_layer_may_be_compiled_alone(make, step, close) -> None:
    model = make("llama")
    exact = step(model)
    fused = apply(model, ALL)
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="eager")
    close(step(model), exact)
    assert all(calls(fused).values())


def test_evaluation_a_cache_and_a_compiled_reader_of_logits(make, tokens) -> None:
    model = make("llama")
    fused = apply(model, ALL)

    def read(ids: Tensor) -> tuple[Tensor, ...]:
        outputs = model(input_ids=ids, labels=ids)  # with the KV cache that the config asks for
        return outputs.loss, outputs.logits.argmax(-1), outputs.logits.float().mean()

    compiled = torch.compile(read, backend="eager")
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            for ours, exact in zip(compiled(tokens), read(tokens), strict=True):
                torch.testing.assert_close(ours, exact)
    with torch.no_grad():
        alone = torch.compile(model, backend="eager")(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(alone, model(input_ids=tokens, use_cache=False).logits)
    assert calls(fused)["cross_entropy", "base_model.model"] == 4


# Tracing all of backward takes 40 s on a CPU.
@pytest.mark.parametrize("backward_too", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_whole_step_may_be_compiled(backward_too, make, tokens, step, close) -> None:
    model = make("llama")
    fused = apply(model, ALL, checkpointing="selective")
    eager = step(model)
    once = calls(fused)

    def train(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    with torch._dynamo.config.patch(compiled_autograd=backward_too):
        compiled = torch.compile(train, backend="eager")
        for count in (2, 3):
            model.zero_grad()
            ours = {"loss": compiled(tokens)}
            ours |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            close(ours, eager, 1e-5)
            assert calls(fused) == {key: count * n for key, n in once.items()}


def test_other_adapters_after_compiling(make, step, close) -> None:
    model = make("llama")
    apply(model, ALL)
    compiled = torch.compile(model, backend="eager")
    step(model, compiled)
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.data.normal_(std=0.05)
    model.set_adapter("other")
    ours = step(model, compiled)
    close(ours, step(model), 1e-5)
    assert any("lora_B.other" in name for name in ours)
    with model.disable_adapter(), torch.no_grad():
        ids = torch.arange(3, 15, device=ours["loss"].device)[None]
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


def test_a_graph_without_breaks_is_refused_with_the_reason(make, tokens) -> None:
    model = make("llama")
    apply(model, ALL)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compiler\.disable|lorafuse"):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens, labels=tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("family", "operations", "options"),
    [
        ("llama", ALL, {}),
        ("llama", PARTS, {"nf4": True}),
        ("qwen3", ALL | STOCK_LOSS, {}),
        # in 16 bit, another rounding may choose another expert
        ("mixtral", ALL, {"dtype": torch.float32}),
    ],
    ids=["llama", "parts", "loss", "mixtral"],
)
def test_inductor_on_a_gpu(family, operations, options, dynamic, mode, make, step, close) -> None:
    model = make(family, **{"dtype": torch.bfloat16} | options)
    fused = apply(model, operations)
    eager = step(model)
    once = calls(fused)
    compiled = torch.compile(model, mode=mode, dynamic=dynamic)
    for count in range(2, 6):
        # What is compiled rounds less often than its stock form.
        close(step(model, compiled), eager, 5e-2)
        assert calls(fused) == {key: count * n for key, n in once.items()}
    assert not stock_calls(fused)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["auto", "selective", "offload"])
@pytest.mark.parametrize("graphs", [False, True])
def test_memory_plans_and_graphs_under_inductor(checkpointing, graphs, make, step, close) -> None:
    model = make("llama", dtype=torch.bfloat16)
    eager = step(model)
    fused = apply(model, ALL, checkpointing=checkpointing, graphs=graphs)
    compiled = torch.compile(model)
    for _ in range(6):
        close(step(model, compiled), eager, 5e-2)
    replayed = [r.calls for r in fused.records if r.operation == "graphs"]
    assert all(bool(n) == (checkpointing == "auto") for n in replayed) and bool(replayed) == graphs
