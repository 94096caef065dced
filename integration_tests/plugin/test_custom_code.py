"""Models with code of their own (`trust_remote_code`): recognised, proven and fused, or refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lorafuse import fuse
from lorafuse.plugin.doctor import diagnose
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.family_trial import largest_error, one_step

TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}

CONFIG = """
from transformers import PretrainedConfig


class NewsConfig(PretrainedConfig):
    model_type = "news_from_nowhere"

    def __init__(self, vocab_size=96, hidden_size=64, layers=2, heads=4, inner=128, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.layers, self.heads, self.inner = layers, heads, inner
        self.num_hidden_layers, self.num_attention_heads = layers, heads
        super().__init__(**kwargs)
"""

# A pre-norm decoder as somebody may write it: no line of transformers' own Llama. `HONEST` is
# replaced in the variants that look the same and compute something else.
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_news import NewsConfig


class Norm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float() * (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return y.to(x.dtype) * self.weight


class Gated(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.into_gate = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.into_value = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.back = nn.Linear(config.inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.back(nn.functional.silu(self.into_gate(x)) * self.into_value(x))


def turn(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Looking(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.heads
        self.scaling, self.num_key_value_groups = self.head_dim**-0.5, 1
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (
            p(hidden_states).view(shape).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (turn(x, *(p[:, None] for p in position_embeddings)) for x in (q, k))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(out.reshape(*shape[:2], -1)), weights


class Block(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.look, self.think = Looking(config, layer_idx), Gated(config)
        self.norm_look, self.norm_think = Norm(config.hidden_size), Norm(config.hidden_size)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        h = hidden_states
        HONEST


class NewsModel(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa = NewsConfig, "model", True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.layers)])
        self.norm = Norm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        h = self.embed(input_ids)
        half = self.config.hidden_size // self.config.heads // 2
        rates = 1e4 ** (-torch.arange(half, device=h.device).float() / half)
        angles = torch.arange(h.shape[1], device=h.device).float()[None, :, None] * rates
        angles = torch.cat((angles, angles), dim=-1)
        positions = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        for block in self.blocks:
            h = block(h, position_embeddings=positions)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h))


class NewsForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix, _supports_sdpa = NewsConfig, "model", True

    def __init__(self, config):
        super().__init__(config)
        self.model = NewsModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_input_embeddings(self):
        return self.model.embed

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        h = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits, loss = self.lm_head(h), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)
"""

LOOK = "self.look(self.norm_look(h), position_embeddings, attention_mask)[0]"
BLOCKS = {
    "honest": (
        f"h = h + {LOOK}",
        "return h + self.think(self.norm_think(h))",
    ),
    "scales its residual": (
        f"h = h + 0.9 * {LOOK}",
        "return h + self.think(self.norm_think(h))",
    ),
    "takes its own input for the second block": (
        f"g = h + {LOOK}",
        "return g + self.think(self.norm_think(h))",
    ),
    "detaches": (
        f"h = h + {LOOK}",
        "return h + self.think(self.norm_think(h).detach())",
    ),
    "scales its second layer": (
        f"h = h + (0.5 if self.look.layer_idx == 1 else 1) * {LOOK}",
        "return h + self.think(self.norm_think(h))",
    ),
    "adds noise": (
        f"h = h + {LOOK} + 0.01 * torch.randn_like(h)",
        "return h + self.think(self.norm_think(h))",
    ),
}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies such code into a cache and imports it from there: one of the test's."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    path, known = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        if name not in known:
            del sys.modules[name]


def write(folder: Path, kind: str) -> Path:
    """A model's folder as one downloads it: config.json with auto_map, its code, safetensors."""
    folder.mkdir()
    (folder / "configuration_news.py").write_text(CONFIG, "utf-8")
    block = "\n        ".join(BLOCKS[kind])
    (folder / "modeling_news.py").write_text(MODEL.replace("HONEST", block), "utf-8")
    (folder / "config.json").write_text(
        """{"model_type": "news_from_nowhere", "architectures": ["NewsForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_news.NewsConfig",
                     "AutoModelForCausalLM": "modeling_news.NewsForCausalLM"}}""",
        "utf-8",
    )
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1) if "norm" not in name else parameter.add_(0.1)
    weights = folder / "weights"
    model.save_pretrained(weights)
    (weights / "model.safetensors").rename(folder / "model.safetensors")
    return folder


def load(folder: Path) -> Any:
    """With adapters whose B is not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__module__.startswith("transformers_modules.")
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def test_an_honest_model_is_fused_whole_and_trains_as_stock(tmp_path: Path) -> None:
    model = load(write(tmp_path / "honest", "honest"))
    stock = one_step(model, BATCH)
    report = fuse(model, fused_strict=False)
    ours = one_step(model, BATCH)
    error, where = largest_error(ours, stock)
    assert error < 1e-4, where
    operations = report.operations()
    for name in ("lora_mlp", "lora_qkv", "lora_o", "rope"):
        assert operations[name].levels == {"layer": 2}, (report.notes, operations[name])
        assert operations[name].called == 2
    for name in ("rms_norm", "cross_entropy"):
        assert operations[name].called == operations[name].found > 0, operations[name].fallbacks
    report.unfuse()
    assert largest_error(one_step(model, BATCH), stock)[0] == 0


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "honest"])
def test_one_that_lies_is_refused_and_trains_as_stock(kind: str, tmp_path: Path) -> None:
    model = load(write(tmp_path / "liar", kind))
    stock = one_step(model, BATCH)
    honest = load(write(tmp_path / "honest", "honest"))
    assert largest_error(one_step(honest, BATCH), stock)[0] > 1e-2  # it does lie
    report = fuse(model)
    error, where = largest_error(one_step(model, BATCH), stock)
    assert error < 1e-4, where
    whole = [name for name, one in report.operations().items() if "layer" in one.levels]
    first_is_honest = kind == "scales its second layer"
    assert bool(whole) == first_is_honest
    if first_is_honest:
        assert report.operations()["lora_mlp"].levels == {"layer": 1, "part": 1}
    assert any("verification" in note for note in report.notes), report.notes
    # what is right in it is fused all the same
    assert report.operations()["lora_mlp"].called == 2


def test_twenty_steps_follow_stock(tmp_path: Path) -> None:
    folder = write(tmp_path / "honest", "honest")
    curves = []
    for fused in (False, True):
        model = load(folder)
        if fused:
            fuse(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        losses = []
        for _ in range(20):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][0] - curves[0][-1] > 0.3
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-4


def test_the_doctor_runs_such_code_only_where_the_yaml_trusts_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "honest", "honest")
    with pytest.raises(FuseConfigError, match="trust_remote_code=True"):
        diagnose(str(folder))
    settings = {
        "base_model": str(folder), "adapter": "lora", "lora_r": 4, "lora_target_linear": True,
        "plugins": ["lorafuse.LorafusePlugin"], "fused": True, "trust_remote_code": True,
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings), "utf-8")
    operations = diagnose(str(config)).report.operations()
    assert operations["lora_mlp"].levels == operations["rope"].levels == {"layer": 2}
