"""The fused causal loss against the model's own, on whole models and through their own forwards."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
)
from trl.trainer import sft_trainer
from trl.trainer.utils import entropy_from_logits

from lorafuse.patches.bind import Binding
from lorafuse.patches.deferred_logits import DeferredLogits
from lorafuse.patches.loss import FusedCausalLoss, recognise_causal_head, verify_causal_loss

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS = {
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=4.0),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=128, n_embd=64, n_layer=1, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
}


def fuse_loss(model: nn.Module) -> tuple[FusedCausalLoss, Binding]:
    head = recognise_causal_head(model)
    assert not isinstance(head, str), head
    assert verify_causal_loss(head) is None
    binding = Binding()
    forward = FusedCausalLoss(head)
    binding.bind(head.module, forward)
    return forward, binding


def why_not(model: nn.Module) -> str:
    head = recognise_causal_head(model)
    reason = head if isinstance(head, str) else verify_causal_loss(head)
    assert reason is not None
    return reason


def plain(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.fixture
def llama(device: torch.device) -> Any:
    return plain(LlamaConfig(**SMALL)).to(device)


@pytest.fixture
def labels(tokens: Tensor) -> Tensor:
    labels = tokens.clone()
    labels[0, :7] = -100
    labels[1, -4:] = -100
    return labels


def run(model: Any, tokens: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
    """Loss, every gradient, and what else a forward gives as numbers."""
    model.zero_grad()
    out = model(input_ids=tokens, labels=labels, **more)
    out.loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name in ("num_valid_tokens", "num_correct_tokens", "entropy_sum", "aux_loss"):
        if out.get(name) is not None:
            got[name] = out[name].detach().float()
    model.zero_grad()
    return got | {"loss": out.loss.detach()}


def same(ours: dict[str, Tensor], stock: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert set(ours) == set(stock)
    for name, expected in stock.items():
        error = (ours[name].double() - expected.double()).norm()
        assert error <= limit * expected.double().norm() + 1e-9, (name, error)


COUNTS: list[dict[str, Any]] = [{}, {"num_items_in_batch": 51}]


@pytest.mark.parametrize("more", COUNTS, ids=["mean", "count"])
@pytest.mark.parametrize(
    "family", ["llama", "llama-biased", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
)
def test_families_with_lora(make_peft, tokens, labels, family, more):
    model = make_peft(family, target_modules=["q_proj", "v_proj", "qkv_proj"])
    stock = run(model, tokens, labels, **more)
    forward, _ = fuse_loss(model)
    same(run(model, tokens, labels, **more), stock)
    assert forward.calls == 1 and not forward.stock_calls


@pytest.mark.parametrize("more", COUNTS, ids=["mean", "count"])
@pytest.mark.parametrize("name", OTHERS)
def test_scaled_auxiliary_and_tied_losses_trained_in_full(device, tokens, labels, name, more):
    model = plain(OTHERS[name]()).to(device)
    stock = run(model, tokens, labels, **more)
    assert ("aux_loss" in stock) == (name == "mixtral")
    forward, _ = fuse_loss(model)
    same(run(model, tokens, labels, **more), stock)
    assert forward.calls == 1 and not forward.stock_calls


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["lora", "lora-bias", "saved", "saved-with-embedding"],
)
def test_adapted_and_trained_heads(make_peft, tokens, labels, lora):
    model = make_peft("llama", **lora)
    head = [n for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
    stock = run(model, tokens, labels)
    assert head and set(head) <= set(stock)
    forward, _ = fuse_loss(model)
    same(run(model, tokens, labels), stock)
    assert forward.calls == 1 and not forward.stock_calls


def test_several_and_disabled_adapters_of_the_head(make_peft, tokens, labels):
    model = make_peft("llama", target_modules=["q_proj", "lm_head"])
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    stock = run(model, tokens, labels)
    forward, _ = fuse_loss(model)
    same(run(model, tokens, labels), stock)
    with model.disable_adapter(), torch.no_grad():
        fused = model(input_ids=tokens, labels=labels).loss
        expected = forward.stock(input_ids=tokens, labels=labels).loss
    torch.testing.assert_close(fused, expected)
    assert forward.calls == 2 and not forward.stock_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_16_bit(make_peft, tokens, labels, family, dtype, oracle_model):
    """Error against fp32 at most twice stock's own."""
    model = make_peft(family, dtype=dtype, target_modules=["q_proj", "v_proj"])
    exact = run(oracle_model(model), tokens, labels)
    stock = run(model, tokens, labels)
    forward, _ = fuse_loss(model)
    fused = run(model, tokens, labels)
    assert forward.calls == 1 and not forward.stock_calls
    for name, expected in exact.items():
        errors = [(x[name].double() - expected.double()).norm() for x in (fused, stock)]
        slack = torch.finfo(dtype).eps * expected.double().norm()
        assert errors[0] <= 2 * errors[1] + slack, (name, errors)


def test_autocast(llama, tokens, labels):
    with torch.autocast(tokens.device.type, torch.bfloat16):
        stock = run(llama, tokens, labels)
    forward, _ = fuse_loss(llama)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        fused = run(llama, tokens, labels)
    same(fused, stock, limit=2e-2)
    torch.testing.assert_close(fused["loss"], stock["loss"], rtol=1e-5, atol=1e-5)
    assert forward.calls == 1 and not forward.stock_calls


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that any operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.numel = max(self.numel, x.numel())
        return out


def test_the_logits_of_the_batch_never_exist(tokens, device, monkeypatch):
    V, rows = 5000, 10
    for limit in ("_CPU_CHUNK_BYTES", "_GPU_CHUNK_BYTES"):
        monkeypatch.setattr(f"lorafuse.kernels.linear_cross_entropy.{limit}", rows * V * 4)
    model = plain(LlamaConfig(**SMALL | {"vocab_size": V})).to(device).requires_grad_(False)
    model.model.layers.requires_grad_(True)
    ids = tokens.repeat(1, 6)  # 240 tokens; the head's weight is as large as the logits of 64
    with Largest() as stock:
        model(input_ids=ids, labels=ids).loss.backward()
    assert stock.numel == ids.numel() * V
    forward, _ = fuse_loss(model)
    with Largest() as fused:
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        entropy_from_logits(out.logits[..., :-1, :])
        out.logits[..., :-1, :].argmax(dim=-1)
    assert fused.numel <= 64 * V
    assert forward.calls == 1 and not forward.stock_calls


# Readers of outputs.logits


def test_trls_entropy_and_accuracy(llama, tokens, labels):
    """As SFTTrainer computes them with loss_type="nll"."""

    def metrics(logits: Tensor) -> tuple[Tensor, Tensor]:
        shifted = logits[..., :-1, :]
        return entropy_from_logits(shifted, chunk_size=7), shifted.argmax(dim=-1)

    with torch.no_grad():
        entropy, predictions = metrics(llama(input_ids=tokens, labels=labels).logits)
    forward, _ = fuse_loss(llama)
    with torch.no_grad():
        fused_entropy, fused_predictions = metrics(llama(input_ids=tokens, labels=labels).logits)
    torch.testing.assert_close(fused_entropy, entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused_predictions, predictions)
    assert forward.calls == 1 and not forward.stock_calls


READERS: dict[str, Any] = {
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.float32).to(z.device),
    "to double": lambda z: z.to(torch.float64),
    "slice": lambda z: z[:, 1:-1],
    "dots": lambda z: z[..., :-1, :],
    "words": lambda z: z[..., 3:9],
    "one": lambda z: z[0, 3],
    "word": lambda z: z[0, 3, 5],
    "mask": lambda z: z[torch.arange(40, device=z.device).view(2, 20) % 3 == 0],
    "none": lambda z: z[:, None],
    "list": lambda z: z[[1, 0, 1]],
    "view": lambda z: z.view(-1, z.size(-1)),
    "view 2": lambda z: z.reshape(40, -1),
    "view all": lambda z: z.view(-1),
    "flatten": lambda z: z.flatten(0, 1),
    "flatten all": lambda z: z.flatten(),
    "contiguous": lambda z: z[:, 2:].contiguous(),
    "split": lambda z: torch.cat(z.split(3, dim=1), dim=1),
    "scale": lambda z: 2 * z * 3 / 4,
    "softcap": lambda z: torch.tanh(z * 8 / 0.5) * 0.5,
    "scale after cap": lambda z: (0.5 * (z / 0.5).tanh()) * -2,
    "add": lambda z: z + 1,
    "from the left": lambda z: torch.ones(128, device=z.device) * z,
    "compare": lambda z: (z > 0).float() * z,
    "softmax": lambda z: z.softmax(-1),
    "softmax over rows": lambda z: z.softmax(1),
    "log_softmax": lambda z: F.log_softmax(z[:, 1:], dim=-1),
    "p log p": lambda z: (lambda q: torch.exp(q) * q)(torch.log_softmax(z, -1)),
    "logsumexp": lambda z: torch.logsumexp(z, dim=-1),
    "gather": lambda z: z.gather(-1, torch.zeros(2, 20, 1, dtype=torch.int64, device=z.device)),
    "matmul": lambda z: z @ torch.ones(128, 2, device=z.device),
    "mean": lambda z: z.mean(),
    "detach": lambda z: z.detach(),
    "cat": lambda z: torch.cat([z, z]),
    "in place": lambda z: (z.mul_(2), z)[1] + 0,
    "augmented": lambda z: (lambda a: (a.__imul__(2), a)[1] + 0)(z[:, 1:]),
    "none reduced": lambda z: F.cross_entropy(
        z.view(-1, 128), torch.arange(40, device=z.device), reduction="none"
    ),
    "weighted": lambda z: F.cross_entropy(
        z.view(-1, 128), torch.arange(40, device=z.device), torch.arange(128.0, device=z.device)
    ),
    "transposed": lambda z: F.cross_entropy(
        z.transpose(1, 2), torch.arange(40, device=z.device).view(2, 20)
    ),
    "soft labels": lambda z: F.cross_entropy(
        z.view(-1, 128), torch.full((40, 128), 1 / 128, device=z.device)
    ),
    "another loss": lambda z: F.cross_entropy(
        (3 * z[:, ::2]).reshape(-1, 128),
        torch.arange(20, device=z.device),
        reduction="sum",
        label_smoothing=0.1,
    ),
    "a list": lambda z: torch.tensor(z[0, 0].tolist()),
    "iteration": lambda z: torch.stack([row * 2 for row in z]),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_gets_the_right_values_and_gradients(llama, tokens, labels, name):
    read = READERS[name]

    def results() -> tuple[Tensor, Tensor | None]:
        llama.zero_grad()
        z = llama(input_ids=tokens, labels=labels).logits
        y = read(z)
        if not y.requires_grad:
            return y + 0, None
        weight = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
        (y * weight).sum().backward()
        return y.detach() + 0, llama.model.embed_tokens.weight.grad.clone()

    stock = results()
    fuse_loss(llama)
    fused = results()
    assert (fused[1] is None) == (stock[1] is None)
    for ours, theirs in zip(fused, stock, strict=True):
        if theirs is not None and ours is not None:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_deferred_logits_look_like_logits(llama, tokens, labels):
    stock = llama(input_ids=tokens, labels=labels).logits
    forward, _ = fuse_loss(llama)
    fused = llama(input_ids=tokens, labels=labels).logits
    assert isinstance(fused, DeferredLogits) and isinstance(fused, Tensor)
    assert fused.shape == stock.shape and fused.size(-1) == stock.size(-1)
    assert (fused.dtype, fused.device, fused.dim()) == (stock.dtype, stock.device, stock.dim())
    assert fused.requires_grad and len(fused) == len(stock) and "Deferred" in repr(fused)
    assert not forward.stock_calls
    assert torch.equal(fused + 0, stock)
    assert dict(forward.stock_calls) == {"add read the logits": 1}


def test_a_hook_on_the_logits_waits_for_a_reader(llama, tokens, labels):
    """FSDP2 hooks every output, asks for its `_base`, and reads none."""
    forward, _ = fuse_loss(llama)
    seen: list[Tensor] = []
    out = llama(input_ids=tokens, labels=labels)
    handle = out.logits.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    assert out.logits._base is None and out.logits.grad_fn is None
    out.loss.backward()
    assert not seen and not forward.stock_calls

    def gradient(read, hooks) -> Tensor:
        llama.zero_grad()
        logits = llama(input_ids=tokens, labels=labels).logits
        handles = [logits.register_hook(hook) for hook in hooks]
        for one in handles[1:]:
            one.remove()
        read(logits).backward()
        return llama.get_parameter("model.layers.0.mlp.up_proj.weight").grad.clone()

    for read in (lambda z: z.square().mean(), lambda z: z[:, :-1].float().square().mean()):
        expected = gradient(read, [])
        hooks = [lambda g: seen.append(g) or 3 * g, lambda g: 5 * g]
        torch.testing.assert_close(gradient(read, hooks), 3 * expected)
        assert seen.pop().shape == (*tokens.shape, SMALL["vocab_size"])
    handle.remove()
    with torch.no_grad():  # nothing to hook: rows are picked without computing the rest
        before = sum(forward.stock_calls.values())
        llama(input_ids=tokens, labels=labels).logits[:, :-1].argmax(-1)
        assert sum(forward.stock_calls.values()) == before


def test_a_copy_of_the_logits_is_put_off_as_well(llama, tokens, labels):
    """DDP copies every output where it looks for unused parameters."""
    forward, _ = fuse_loss(llama)
    logits = llama(input_ids=tokens, labels=labels).logits
    copied = logits.clone()
    assert isinstance(copied, DeferredLogits) and not forward.stock_calls
    torch.testing.assert_close(copied.add_(1.0) - 1.0, logits + 0.0)


def test_code_that_skips_torchs_overrides_is_told_so_in_training(llama, tokens, labels):
    fuse_loss(llama)
    z = llama(input_ids=tokens, labels=labels).logits
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="put off"):
        torch.add(z, 1)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        assert torch.add(z, 1).shape == z.shape


# Evaluation, generation, and what goes the stock way


def test_evaluation_gives_real_logits_and_no_logits_for_the_loss_alone(llama, tokens, labels):
    llama.eval()
    with torch.no_grad():
        stock = llama(input_ids=tokens, labels=labels)
    forward, _ = fuse_loss(llama)
    with torch.no_grad():
        fused = llama(input_ids=tokens, labels=labels)
    torch.testing.assert_close(fused.loss, stock.loss)
    assert forward.calls == 1 and not forward.stock_calls
    read = fused.logits.detach()  # what Trainer.prediction_step does
    assert type(read) is Tensor and torch.equal(read, stock.logits)
    assert sum(forward.stock_calls.values()) == 1


def test_no_labels_a_cache_and_generate_go_the_stock_way(llama, tokens, labels):
    llama.eval()
    prompt = tokens[:, :6]
    stock = llama.generate(prompt, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        first = llama(input_ids=tokens[:, :10], use_cache=True)
    cache = copy.deepcopy(first.past_key_values)
    expected = llama(tokens[:, 10:], past_key_values=cache, labels=labels[:, 10:]).loss
    forward, _ = fuse_loss(llama)
    assert torch.equal(llama.generate(prompt, max_new_tokens=8, do_sample=False), stock)
    with torch.no_grad():
        out = llama(input_ids=tokens)
    assert type(out.logits) is Tensor
    cache = copy.deepcopy(first.past_key_values)
    got = llama(tokens[:, 10:], past_key_values=cache, labels=labels[:, 10:]).loss
    assert torch.equal(got, expected)
    assert forward.calls == 0
    assert set(forward.stock_calls) == {
        "no labels were passed: the caller wants logits",
        "a KV cache is in use",
    }


def test_arguments_and_outputs_as_stock(llama, tokens, labels):
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((tokens, None, None, None, None, labels), {}),
        ((tokens,), {"labels": labels, "shift_labels": shifted * 0 + 5}),
        ((tokens,), {"labels": labels.masked_fill(labels < 0, 17), "ignore_index": 17}),
        ((tokens,), {"labels": labels, "num_items_in_batch": torch.tensor(9)}),
        ((tokens,), {"labels": labels, "output_hidden_states": True}),
        ((tokens,), {"labels": labels * 0 - 100}),
    ]
    stock = [llama(*args, **kwargs) for args, kwargs in calls]
    tuple_out = llama(tokens, labels=labels, return_dict=False)
    forward, _ = fuse_loss(llama)
    for (args, kwargs), expected in zip(calls, stock, strict=True):
        got = llama(*args, **kwargs)
        assert type(got) is type(expected) and list(got) == list(expected)
        torch.testing.assert_close(got.loss, expected.loss, equal_nan=True)
        for ours, theirs in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
            assert torch.equal(ours, theirs)
    assert stock[-1].loss.isnan()
    got = llama(tokens, labels=labels, return_dict=False)
    torch.testing.assert_close(got[0], tuple_out[0])
    assert forward.calls == len(calls) + 1 and not forward.stock_calls


def test_hooks_on_the_head_run(llama, tokens, labels):
    forward, _ = fuse_loss(llama)
    seen: list[torch.Size] = []
    handle = llama.lm_head.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    llama(input_ids=tokens, labels=labels)
    assert seen == [(2, 20, 128)]
    assert dict(forward.stock_calls) == {"a hook on the head has to run": 1}
    handle.remove()
    llama(input_ids=tokens, labels=labels)
    assert forward.calls == 1


def test_dropout_on_an_adapted_head_goes_the_stock_way(make_peft, tokens, labels):
    model = make_peft("llama", target_modules=["lm_head"], lora_dropout=0.5)
    assert "dropout" in why_not(model)
    model.eval()
    forward, _ = fuse_loss(model)
    model.train()
    torch.manual_seed(3)
    fused = run(model, tokens, labels)
    torch.manual_seed(3)
    model.zero_grad()
    assert torch.equal(fused["loss"], forward.stock(input_ids=tokens, labels=labels).loss)
    assert sum(forward.stock_calls.values()) == 1 and forward.calls == 0


# A forward that the trainer has replaced

# Gone from TRL 1.16 on.
_patch_chunked_ce_lm_head: Any = getattr(sft_trainer, "_patch_chunked_ce_lm_head", None)
chunked = pytest.mark.skipif(
    _patch_chunked_ce_lm_head is None, reason="this TRL has no chunked loss of its own"
)


@chunked
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("count", [None, 51])
@pytest.mark.parametrize("training", [True, False])
def test_trls_chunked_loss(make_peft, tokens, labels, family, count, training):
    model = make_peft(OTHERS[family]() if family in OTHERS else family, target_modules=["q_proj"])
    _patch_chunked_ce_lm_head(model.get_base_model(), chunk_size=8)
    model.train(training)
    more = {} if count is None else {"num_items_in_batch": count}
    stock_output = model(input_ids=tokens, labels=labels, **more)
    stock = run(model, tokens, labels, **more)
    assert {"num_valid_tokens", "num_correct_tokens", "entropy_sum"} < set(stock)
    forward, binding = fuse_loss(model)
    same(run(model, tokens, labels, **more), stock)
    output = model(input_ids=tokens, labels=labels, **more)
    assert type(output) is type(stock_output) and output.logits is None
    assert set(output) == set(stock_output)
    assert forward.calls == 2 and not forward.stock_calls
    nothing = torch.full_like(labels, -100)
    no_count = {name: 0 for name in more}  # as transformers counts it
    empty = [run(model, tokens, nothing, **counts) for counts in (more, no_count)]
    binding.undo()
    for ours, counts in zip(empty, (more, no_count), strict=True):
        assert ours["loss"] == 0
        expected = run(model, tokens, nothing, **counts)
        if not expected["loss"].isnan():  # TRL 1.14 divides by a count of 0
            same(ours, expected)


@chunked
def test_trls_chunked_loss_without_labels(llama, tokens):
    stock = llama(input_ids=tokens).logits
    _patch_chunked_ce_lm_head(llama, chunk_size=8)
    forward, _ = fuse_loss(llama)
    assert torch.equal(llama(input_ids=tokens).logits, stock)
    expected = llama(input_ids=tokens, shift_labels=tokens)
    assert expected.num_valid_tokens == tokens.numel()  # only the replaced forward gives that
    assert forward.calls == 0 and sum(forward.stock_calls.values()) == 2


# What is refused, and why


def test_models_that_are_refused(llama, make_peft, device):
    assert "no output embeddings" in why_not(nn.Linear(2, 2))
    assert "no output embeddings" in why_not(llama.model)
    opt = plain(OPTConfig(**SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 64}))
    assert "does not call its backbone" in why_not(opt)

    def focal(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        p = logits[:, :-1].softmax(-1).gather(-1, labels[:, 1:, None].clamp_min(0))
        return -((1 - p) ** 2 * p.log()).mean()

    llama.loss_function = focal
    assert "softmax read the logits" not in why_not(llama)
    assert "not the cross-entropy of the logits" in why_not(llama)


def test_a_loss_that_is_partly_something_else_is_right(llama, tokens, labels):
    """Not refused: the model's own code computes the rest, from the real logits."""

    def with_penalty(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        flat = logits[:, :-2].reshape(-1, vocab_size)  # and an odd shift, by two
        loss = F.cross_entropy(flat, labels[:, 2:].reshape(-1))
        return loss + 1e-2 * logits.logsumexp(-1).square().mean()

    llama.loss_function = with_penalty
    stock = run(llama, tokens, labels)
    forward, _ = fuse_loss(llama)
    same(run(llama, tokens, labels), stock)
    assert forward.calls == 1
    assert dict(forward.stock_calls) == {"logsumexp read the logits": 1}


def test_a_replaced_forward_that_is_not_known_is_refused(llama):
    own = llama.forward
    llama.forward = lambda *args, **kwargs: SimpleNamespace(loss=torch.zeros(()), logits=None)
    assert "replaced by one that is not known" in why_not(llama) or "could not be tried" in why_not(
        llama
    )
    llama.forward = lambda *args, **kwargs: own(*args, **kwargs)
    fuse_loss(llama)


@chunked
def test_a_wrong_by_product_is_refused(llama):
    _patch_chunked_ce_lm_head(llama, chunk_size=8)
    own = llama.forward

    def counts_wrong(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out["entropy_sum"] = out["entropy_sum"] * 1.01
        return out

    llama.forward = counts_wrong
    assert "entropy_sum differs" in why_not(llama)


def test_a_4_bit_head_is_refused(llama):
    bnb = pytest.importorskip("bitsandbytes")
    llama.lm_head = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4")
    assert "Linear4bit" in why_not(llama)


# No traces


def test_recognition_and_verification_leave_no_trace(make_peft, tokens):
    model = make_peft("llama", target_modules=["q_proj", "lm_head"])
    model(input_ids=tokens, labels=tokens).loss.backward()
    states = [m.__dict__.copy() for m in model.modules()]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    values = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    assert verify_causal_loss(recognise_causal_head(model)) is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    for module, state in zip(model.modules(), states, strict=True):
        assert module.__dict__.keys() == state.keys()
        assert all(module.__dict__[key] is value for key, value in state.items())


def test_undo_and_errors_leave_the_head_as_it_was(llama, tokens, labels):
    stock = llama(input_ids=tokens, labels=labels)
    _, binding = fuse_loss(llama)
    with pytest.raises(ValueError, match="batch_size"):
        llama(input_ids=tokens, labels=labels[:, :5])
    assert "forward" not in llama.lm_head.__dict__
    binding.undo()
    assert "forward" not in llama.__dict__ and "forward" not in llama.lm_head.__dict__
    again = llama(input_ids=tokens, labels=labels)
    assert torch.equal(again.loss, stock.loss) and torch.equal(again.logits, stock.logits)


def test_copies_carry_their_own_fused_loss(llama, tokens, labels, twins):
    make_twins = twins(llama)
    forward, _ = fuse_loss(llama)
    for replica in make_twins():
        own = replica.forward
        assert isinstance(own, FusedCausalLoss) and own is not forward
        assert own.module is replica and own.head.head is replica.lm_head
        with torch.no_grad():
            replica.lm_head.weight.zero_()
        loss = replica(input_ids=tokens, labels=labels).loss
        torch.testing.assert_close(loss, torch.tensor(128.0, device=loss.device).log())
        assert own.calls == 1
    assert forward.calls == 0


def test_the_signature_is_stocks(llama):
    import inspect

    expected = inspect.signature(llama.forward)
    fuse_loss(llama)
    assert inspect.signature(llama.forward) == expected
