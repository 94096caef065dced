"""Structures of a model that lorafuse does not recognise by itself, added through its hook.

CPM-Ant (openbmb/cpm-ant-10b, `CpmAntForCausalLM` in transformers) has the usual parts under names
of its own: its projections are project_q, project_k, project_v and attention_out, and the gate and
the up projection of its MLP lie one module deeper than the down projection.

A recogniser looks at a module and says which of its parts plays which role, or None. That is a
proposal: lorafuse copies the module, computes with this reading, forward and gradients, and uses it
only where the numbers are the stock ones. So a recogniser may guess; a wrong guess trains as stock.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorafuse.patches.structure import GatedMlp, Projections, is_linear, recognise_activation
from lorafuse.plugin.hookspecs import hookimpl


def recognise_projections(module: nn.Module) -> Projections | None:
    """q, k and v of one input, and the output projection beside them."""
    names = ("project_q", "project_k", "project_v", "attention_out")
    parts = [getattr(module, name, None) for name in names]
    if not all(is_linear(part) for part in parts):
        return None
    return Projections(module, qkv=tuple(parts[:3]), o=parts[3])


def recognise_nested_mlp(module: nn.Module) -> GatedMlp | None:
    """down(act(gate(x)) * up(x)), where gate, up and the activation are in a module `w_in`."""
    inner, down = getattr(module, "w_in", None), getattr(module, "w_out", None)
    gate, up = getattr(inner, "w_0", None), getattr(inner, "w_1", None)
    activation = recognise_activation(getattr(inner, "act", None))
    if activation is None or not all(is_linear(part) for part in (gate, up, down)):
        return None
    return GatedMlp(module, gate_up=(gate, up), down=down, activation=activation)


@hookimpl
def lorafuse_structures() -> Sequence[Any]:
    """Asked before lorafuse's own recognisers."""
    return (recognise_projections, recognise_nested_mlp)
