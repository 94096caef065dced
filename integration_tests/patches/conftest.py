"""Tiny random models of transformers' own classes, with adapters, as the patches meet them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 8}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-biased": lambda: LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SMALL, **WINDOW),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, **HEAD),
    "gemma": lambda: GemmaConfig(**SMALL, **HEAD),
    "gemma2": lambda: Gemma2Config(**SMALL, **HEAD, **WINDOW, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, **HEAD, **WINDOW, query_pre_attn_scalar=16),
    "phi3": lambda: Phi3Config(**SMALL),
    "glm4": lambda: Glm4Config(**SMALL, **HEAD),
    "granite": lambda: GraniteConfig(**SMALL, residual_multiplier=0.22, embedding_multiplier=12.0),
    "ernie": lambda: Ernie4_5Config(**SMALL, **HEAD),
    "smollm3": lambda: SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
}
# Gemma 2's soft cap on attention scores exists in eager attention only.
EAGER = ("gemma2",)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def quantise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replaces the decoder layers' linears by bitsandbytes' NF4, as loading in 4 bit does."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        in_layer = any(part in name for part in ("layers.", ".h."))
        if isinstance(module, nn.Linear) and in_layer and not name.endswith("router"):
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                quant_storage=torch.bfloat16,
            )
            weight = bnb.nn.Params4bit(
                module.weight.data,
                requires_grad=False,
                quant_type="nf4",
                quant_storage=torch.bfloat16,
                module=layer,
            )
            layer.weight = weight._quantize(device)
            if module.bias is not None:
                layer.bias = nn.Parameter(module.bias.data, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)


MakePeft = Callable[..., Any]


@pytest.fixture
def make_peft(device: torch.device) -> MakePeft:
    """A PEFT model of a family: `make_peft("llama", dtype=..., nf4=..., **lora)`."""

    def make(
        family: str | PretrainedConfig | nn.Module,
        dtype: torch.dtype = torch.float32,
        nf4: bool = False,
        attention: str | None = None,
        **lora: Any,
    ) -> Any:
        torch.manual_seed(0)
        if isinstance(family, nn.Module):
            model = family
        else:
            config = FAMILIES[family]() if isinstance(family, str) else family
            config._attn_implementation = attention or ("eager" if family in EAGER else "sdpa")
            model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones and zeros hide mistakes
                parameter.data += 0.1 * torch.randn_like(parameter)
            if name.endswith("bias"):
                parameter.data = 0.1 * torch.randn_like(parameter)
        model.to(device, dtype)
        if nf4:
            quantise(model, device, dtype)
        settings = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "lora_dropout": 0.0,
            "task_type": "CAUSAL_LM",
        } | lora
        peft = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.05 * torch.randn_like(parameter)
        return peft.train()

    return make


@pytest.fixture
def tokens(device: torch.device) -> Tensor:
    """Token ids [2, 20], longer than the families' sliding window."""
    return torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0)).to(device)


class Gradients(dict[str, Tensor]):
    """Gradients by parameter name, and the loss under "loss"."""


@pytest.fixture
def step(tokens: Tensor) -> Callable[..., Gradients]:
    """One forward and backward, on `tokens` or on what is given: loss and gradients by name."""

    def run(model: nn.Module, **kwargs: Any) -> Gradients:
        model.zero_grad()
        loss = model(**{"input_ids": tokens, "labels": tokens, **kwargs}).loss
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return Gradients(found, loss=loss.detach())

    return run


@pytest.fixture
def curve(tokens: Tensor) -> Callable[..., list[tuple[float, float]]]:
    """(loss, gradient norm) of each of some steps of AdamW."""

    def run(model: Any, steps: int, rate: float, **kwargs: Any) -> list[tuple[float, float]]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate)
        found = []
        for _ in range(steps):
            loss = model(**{"input_ids": tokens, "labels": tokens, **kwargs}).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append((float(loss.detach()), float(norm)))
        return found

    return run


@pytest.fixture
def twins() -> Callable[[Any], Callable[[], list[Any]]]:
    """`twins(model)`, before it is fused; called after, a copy and what comes back from a pickle.

    No pickle where a stock model has none: the package `kernels` makes classes within functions.
    """

    def asked(model: Any) -> Callable[[], list[Any]]:
        try:
            pickle.dumps(model)
            ways: list[Any] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
        except (AttributeError, pickle.PicklingError):
            ways = [copy.deepcopy]
        return lambda: [way(model) for way in ways]

    return asked


@pytest.fixture
def close() -> Callable[..., None]:
    """Relative error of every result at most `limit`, against ‖exact‖."""

    def check(ours: Gradients, exact: Gradients, limit: float = 1e-4) -> None:
        assert set(ours) == set(exact)
        for name, expected in exact.items():
            scale = expected.double().norm().clamp_min(1e-12)
            error = float((ours[name].double() - expected.double()).norm() / scale)
            assert error <= limit, (name, error)

    return check


def in_fp32(model: Any) -> Any:
    """The same model with every float in fp32: the oracle of the 16-bit runs."""
    return copy.deepcopy(model).float()


@pytest.fixture
def oracle_model() -> Callable[[Any], Any]:
    return in_fp32
