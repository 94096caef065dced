"""How long a step of each mode takes beside the others: a count of FLOP and bytes.

Rates are what one H100 reached in the step of `kernels/PERFORMANCE.md` (2026-11-25, Llama-3.1-8B,
NF4, r=32, 2 x 4096 tokens). They cancel where modes are compared with each other; what is reported
is the ratio to `off`, not tokens/s. A step takes as long as the GPU computes or as the host issues
it, whichever is longer; in `offload` a layer takes no less than its copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lorafuse.patches.modes import MODES, OFF, OFFLOAD
from lorafuse.plugin.plan_groups import GroupShape, Workload
from lorafuse.plugin.plan_model import LayerShape

GEMM_FLOPS = 732e12  # base GEMMs, LoRA folded in: 246 TFLOP in 336 ms
# cuDNN, 0.47 ms for 0.275 TFLOP, and 74.2 ms less the forward's for 32 layers of 2.5 times that.
_ATTENTION_FLOPS = 585e12
_ATTENTION_BACKWARD_FLOPS = 371e12
# Varlen FlashAttention on documents of 512 tokens: 0.24 and 0.70 ms.
_PACKED_FLOPS, _PACKED_BACKWARD_FLOPS = 143e12, 123e12
_BYTES = 2.75e12  # a second: norms, RoPE, GLU, residual, dequantisation
_LOW_RANK_BYTES = 2.18e12  # the r-wide products
_GLU_BACKWARD_BYTES = 1.98e12  # with the adapters' gradients in the same kernel
_LOSS_BYTES = 1.3e12
_ADAM_BYTES = 0.6e12
PCIE_BYTES = 50e9  # each way
# The host's time to issue a layer's forward and backward: 250 ms for 32 layers, a third forward.
_HOST_FORWARD_S, _HOST_BACKWARD_S = 2.6e-3, 5.2e-3
# Of a forward pass, what `selective` issues again.
_HOST_AGAIN = 0.6


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of the GPU. `again`: what `selective` computes a second time in backward."""

    forward: float
    again: float
    backward: float
    copied_bytes: int  # each way, in `offload`
    gate_up: float  # of `again`, what a layer is spared whose gate/up waits on the host


def relative_times(workload: Workload) -> dict[str, float]:
    """Time of a step by mode, `off` being 1."""
    off = step_seconds(workload, OFF)
    return {mode: step_seconds(workload, mode) / off for mode in MODES}


def step_seconds(
    workload: Workload, modes: str | Sequence[str], spilled: Sequence[bool] = ()
) -> float:
    """Seconds of a step on the H100 that the rates are of; for the ratios, not to be reported.

    Args:
        workload: The step.
        modes: One of `MODES` for all layers, or one for each.
        spilled: Whether gate/up of a layer waits on the host; empty: of none.
    """
    layers = workload.model.layers
    by_layer = [modes] * len(layers) if isinstance(modes, str) else list(modes)
    gpu, host = rest_seconds(workload), 0.0
    for i, (layer, mode) in enumerate(zip(layers, by_layer, strict=True)):
        one = layer_times(workload, layer)
        again = 0.0 if mode == OFF else one.again
        # The last layer's are not copied: its backward is next.
        copied = mode == OFFLOAD and i + 1 < len(layers)
        copy = one.copied_bytes / PCIE_BYTES if copied else 0.0
        if spilled and spilled[i]:
            # Copies of layers that spill are spread over those that do not: they do not wait.
            again, copy = again - one.gate_up, 0.0
        gpu += max(one.forward, copy) + max(again + one.backward, copy)
        host += _HOST_FORWARD_S + _HOST_BACKWARD_S
        host += 0.0 if mode == OFF else _HOST_AGAIN * _HOST_FORWARD_S
    return max(gpu, host)


def layer_times(workload: Workload, layer: LayerShape) -> LayerTimes:
    """The GPU's time in one decoder layer."""
    T, groups = workload.rows, workload.groups(layer)
    H, inner, heads = layer.hidden, layer.intermediate, layer.query_heads
    N = groups.qkv.N
    pairs = attended_pairs(workload, layer.window)
    attention = 4 * pairs * heads * layer.head_size
    rates = (_ATTENTION_FLOPS, _ATTENTION_BACKWARD_FLOPS)
    if workload.documents > 1:
        rates = (_PACKED_FLOPS, _PACKED_BACKWARD_FLOPS)

    gemms = {name: _gemm(T, group) for name, group in vars(groups).items()}
    norms = (8 if layer.post_norms else 4) * 2 * H
    rope = 4 * (heads + layer.key_value_heads) * layer.head_size
    residual = 2 * 6 * H
    again_bytes = norms + rope + 6 * H
    forward_bytes = norms + rope + residual + 6 * inner
    low_rank_forward = 2 * (3 * H + inner)
    low_rank_backward = 2 * (7 * H + 2 * inner + 2 * N)
    weights = sum(one.elements for one in layer.linears)
    written = (2.5 if workload.quant == "nf4" else 0) / _BYTES

    forward = (
        sum(gemms.values())
        + attention / rates[0]
        + T * (forward_bytes / _BYTES + low_rank_forward / _LOW_RANK_BYTES)
        + weights * written
    )
    again = (
        sum(gemms.values())
        - gemms["down"]
        + T * (again_bytes / _BYTES + 2 * 3 * H / _LOW_RANK_BYTES)
        + (weights - layer.down.elements) * written
    )
    backward = (
        sum(gemms.values())
        + 2.5 * attention / rates[1]
        + T * ((2 * norms + 4 * N + 4 * H) / _BYTES + low_rank_backward / _LOW_RANK_BYTES)
        + T * 10 * inner / _GLU_BACKWARD_BYTES
        + weights * written
    )
    copied = 2 * T * (H + heads * layer.head_size + (H if layer.post_norms else 0))
    gate_up = gemms["gate_up"] + T * 2 * 2 * H / _BYTES  # and its norm
    return LayerTimes(forward, again, backward, copied, gate_up)


def attended_pairs(workload: Workload, window: int | None) -> float:
    """Query and key pairs of causal attention, within documents and windows."""
    length = workload.tokens / workload.documents
    seen = min(length, window or length)
    pairs = length * seen - seen * seen / 2
    return workload.batch * workload.documents * pairs


def rest_seconds(workload: Workload) -> float:
    """Head, loss and optimiser."""
    V, H = workload.model.vocabulary, workload.model.hidden
    logits = workload.labelled * V
    return (
        2 * 2 * logits * H / GEMM_FLOPS
        + 4 * logits / _LOSS_BYTES
        + 16 * workload.adapter_elements / _ADAM_BYTES
    )


def _gemm(T: int, group: GroupShape) -> float:
    """One of a group's GEMMs, forward or dX, its LoRA folded in."""
    return 2 * T * group.N * (group.K + group.fold_forward) / GEMM_FLOPS
