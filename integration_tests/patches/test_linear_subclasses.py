"""Linear layers with a forward of their own: read as linear where their numbers say so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.weights import float_weight

ALL = dict.fromkeys(OPERATIONS, True)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Forgets(nn.Linear):
    """Its bias."""

    def forward(self, x):
        return F.linear(x, self.weight)


class Clamped(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias).clamp(-1000, 1000)


class Noisy(nn.Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + torch.randn_like(y) if self.training else y


class Rounded(nn.Linear):
    """Fake quantisation."""

    def forward(self, x):
        return F.linear(x, (self.weight * 8).round() / 8, self.bias)


class Own(nn.Linear):
    """A tensor of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.scale


class Upcast(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias)


class Einsum(nn.Linear):
    def forward(self, x):
        y = torch.einsum("...k,nk->...n", x, self.weight)
        return y if self.bias is None else y + self.bias


class Subclassed(nn.Linear):
    pass


RIGHT = [FalconLinear, Einsum, Subclassed]
WRONG = [Doubled, Forgets, Clamped, Noisy, Rounded, Own, Upcast]


@pytest.mark.parametrize("kind", RIGHT + WRONG, ids=lambda k: k.__name__)
def test_a_subclass_is_read_where_it_computes_as_a_linear_layer(kind) -> None:
    rng = torch.get_rng_state()
    layer = kind(32, 48)
    torch.set_rng_state(rng)
    keys = set(layer.__dict__)
    assert (float_weight(layer) is not None) == (kind in RIGHT)
    assert torch.equal(torch.get_rng_state(), rng) or kind is Noisy
    assert set(layer.__dict__) == keys and layer.in_features == 32


@pytest.mark.parametrize("kind", RIGHT + WRONG, ids=lambda k: k.__name__)
def test_models_of_subclasses_train_as_stock(kind, make_peft, step, close) -> None:
    model = make_peft("llama")
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            if hasattr(module, "weight") and module.weight.shape[0] > 8 < module.weight.shape[1]:
                module.__class__ = kind
                if kind is Own:
                    module.scale = nn.Parameter(torch.full((1,), 1.5, device=module.weight.device))
                    module.scale.requires_grad_(False)
    torch.manual_seed(1)
    stock = step(model)
    fused = apply(model, ALL)
    torch.manual_seed(1)
    close(step(model), stock)
    mlps = [r for r in fused.records if r.operation == "lora_mlp"]
    assert mlps and all(r.fused == (kind in RIGHT or kind is Forgets) for r in mlps), mlps
