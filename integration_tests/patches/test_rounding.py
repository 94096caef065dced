"""A fused part rounds where the family's own code does, which its bits tell.

Llama's norm rounds before the product with the weight, Gemma's does not.
"""

import sys

import pytest
import torch
from transformers import CohereConfig, GptOssConfig, Olmo2Config

from lorafuse.kernels.rope import rope
from lorafuse.patches.attention import Pairing, rounds_rope_products
from lorafuse.patches.norms import FusedRmsNorm
from lorafuse.patches.structure import recognise_attention, recognise_rms_norm

from .conftest import FAMILIES, SMALL

ROUNDED = {
    "llama": True,
    "mistral": True,
    "qwen2": True,
    "qwen3": True,
    "phi3": True,
    "gemma": False,
    "gemma2": False,
    "gemma3": False,
}
OTHERS = {
    "olmo2": (Olmo2Config(**SMALL), False),
    "gpt-oss": (GptOssConfig(**SMALL, head_dim=16, num_local_experts=2), False),
}


def norms(model):
    return [n for m in model.modules() if (n := recognise_rms_norm(m)) is not None]


@pytest.mark.parametrize("family", [*ROUNDED, *OTHERS])
def test_norms_have_the_stock_bits(make_peft, device, family):
    config, rounded = OTHERS.get(family, (family, ROUNDED.get(family)))
    attention = "eager" if family == "gpt-oss" else None
    model = make_peft(
        config, torch.bfloat16, attention=attention, target_modules=["q_proj", "qkv_proj"]
    )
    found = norms(model)
    assert found
    for norm in found:
        assert norm.round_normalised is rounded
        x = 3 * torch.randn(2, 50, norm.weight.numel(), device=device).bfloat16()
        stock = norm.module(x)
        fused = FusedRmsNorm(norm)(x)
        assert fused.dtype == stock.dtype
        assert (fused != stock).double().mean() < 2e-3


PAIRINGS = dict.fromkeys(("glm4", "ernie"), Pairing.NEIGHBOURS_OF_HALVES)


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_has_the_stock_bits(make_peft, device, family):
    model = make_peft(family, dtype=torch.bfloat16)
    attention = next(a for m in model.modules() if (a := recognise_attention(m)) is not None)
    pairing = PAIRINGS.get(family, Pairing.HALVES)
    rounded = rounds_rope_products(attention.module, pairing)
    assert rounded == (family != "ernie")  # which computes in fp32
    own = sys.modules[type(attention.module).__module__].apply_rotary_pos_emb
    q, k = torch.randn(2, 2, 7, 4, 16, device=device).bfloat16()
    angles = 6 * torch.rand(1, 7, 8, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    want = own(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    cos, sin = pairing.lay_out(cos, sin, 16)
    got = rope(q, k, cos, sin, pairing.interleaved, rounded)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs.transpose(1, 2))


def test_rope_that_upcasts_is_told_apart(make_peft):
    """Cohere turns interleaved pairs in fp32."""
    model = make_peft(CohereConfig(**SMALL), dtype=torch.bfloat16)
    module = next(m for m in model.modules() if type(m).__name__ == "CohereAttention")
    assert not rounds_rope_products(module, Pairing.NEIGHBOURS)
