"""What TRL's fused head asks for, by the kernel: the values and gradients of TRL's own function."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, GraniteConfig
from trl.trainer import utils as trl_utils

from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.log_probs import LogProbs

from .conftest import SMALL

LOSS = {"cross_entropy": True}
ALL = dict.fromkeys(OPERATIONS, True)
SFT = ("log_probs", "entropy", "is_top1")
DPO = ("log_probs", "entropy", "mean_logits", "is_top1")
add_fused_lm_head: Any = getattr(trl_utils, "add_fused_lm_head", None)
with_trl = pytest.mark.skipif(add_fused_lm_head is None, reason="TRL has its fused head from 1.15")


class Own:
    """In place of TRL's function, which the TRL of the tests may not have: is it asked?"""

    def __init__(self) -> None:
        self.asked = 0

    def apply(self, *_: Any) -> str:
        self.asked += 1
        return "TRL's"


def call(own: Own, hidden: Tensor, weight: Tensor, *more: Any, outputs: Any = DPO) -> Any:
    reasons: list[str] = []
    labels = torch.arange(hidden.shape[0], device=hidden.device)
    bias, temperature, softcap, scale = more
    result = LogProbs(own, reasons.append).apply(
        hidden, weight, bias, labels, temperature, 32768, softcap, scale, outputs
    )
    return result, reasons


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, None, 0.25), (1.0, 3.0, 2.0)]
)
def test_by_the_definition(device, temperature, softcap, scale, bias) -> None:
    hidden = torch.randn(7, 16, device=device, requires_grad=True)
    weight, b = torch.randn(31, 16, device=device), torch.randn(31, device=device)
    outputs = SFT if softcap else DPO
    (log_probs, entropy, squares, mean, hits), reasons = call(
        Own(), hidden, weight, b if bias else None, temperature, softcap, scale, outputs=outputs
    )
    z = nn.functional.linear(hidden, weight, b if bias else None) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    p = z.log_softmax(-1)
    expected = p[torch.arange(7), torch.arange(7)]
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_probs, expected, **close)
    torch.testing.assert_close(entropy, -(p.exp() * p).sum(-1), **close)
    assert torch.equal(hits, z.argmax(-1) == torch.arange(7, device=device))
    assert squares is None and not reasons and (mean is None) == (softcap is not None)
    if mean is not None:
        torch.testing.assert_close(mean, z.mean(-1), **close)
        assert not mean.requires_grad
    up = torch.randn(7, device=device)
    got, wanted = (torch.autograd.grad((x * up).sum(), hidden)[0] for x in (log_probs, expected))
    torch.testing.assert_close(got, wanted, **close)


def test_what_the_kernel_does_not_give_is_trls(device) -> None:
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(9, 8, device=device)
    for arguments, outputs, reason in (
        ((None, 1.0, None, 1.0), (*SFT, "log_sum_sq_probs"), "log_sum_sq_probs"),
        ((None, 0.5, 30.0, 1.0), SFT, "divides capped logits"),
        ((None, 1.0, 30.0, 1.0), DPO, "or wants their mean"),
        ((torch.randn(9, requires_grad=True), 1.0, None, 1.0), SFT, "the head is trained"),
    ):
        own = Own()
        result, reasons = call(own, hidden, weight, *arguments, outputs=outputs)
        assert result == "TRL's" and own.asked == 1 and len(reasons) == 1
        assert reason in reasons[0]


CONFIGS = {
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=8.0),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
}


def numbers(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """A step of a loss that weighs each token anew, as TRL's dft does."""
    labels = tokens.clone()
    labels[:, :3] = -100
    output = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    (-(output.log_probs * output.log_probs.exp().detach()).sum() / 20).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {n: output[n].detach() for n in ("loss", "log_probs", "entropy")}


@with_trl
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", *CONFIGS])
def test_a_model_with_trls_head(family, make_peft, tokens, close) -> None:
    model = make_peft(CONFIGS[family]() if family in CONFIGS else family)
    add_fused_lm_head(model.get_base_model(), outputs=SFT)
    stock = numbers(model, tokens)
    for enabled in (LOSS, ALL):
        fused = apply(model, enabled)
        close(numbers(model, tokens), stock)
        (record,) = [r for r in fused.records if r.operation == "cross_entropy"]
        assert record.fused and record.calls == 1 and not record.stock_calls
        fused.unfuse()
    close(numbers(model, tokens), stock)


@with_trl
def test_a_trained_head_stays_trls_and_says_so(make_peft, tokens, close) -> None:
    model = make_peft("llama")
    base = model.get_base_model()
    add_fused_lm_head(base, outputs=SFT)
    base.get_output_embeddings().weight.requires_grad_()
    stock = numbers(model, tokens)
    fused = apply(model, LOSS)
    close(numbers(model, tokens), stock)
    (record,) = [r for r in fused.records if r.operation == "cross_entropy"]
    assert record.calls == 0 and any("head is trained" in why for why in record.stock_calls)


@with_trl
def test_a_head_that_computes_something_else_is_found_out(make_peft, tokens, monkeypatch) -> None:
    """A later TRL's function, of the same arguments and another meaning."""
    real = trl_utils._ChunkedLogProbFunction

    class Other:
        @staticmethod
        def apply(*args: Any) -> Any:
            log_probs, *rest = real.apply(*args)
            return (log_probs * 1.01, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Other)
    model = make_peft("llama")
    add_fused_lm_head(model.get_base_model(), outputs=SFT)
    stock = numbers(copy.deepcopy(model), tokens)
    fused = apply(model, LOSS)
    assert torch.equal(numbers(model, tokens)["log_probs"], stock["log_probs"])
    (record,) = [r for r in fused.records if r.operation == "cross_entropy"]
    assert record.calls == 0 and any("verification" in why for why in record.stock_calls)
