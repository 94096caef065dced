"""Fuses a model: recognises its blocks, proves each distinct one, and binds the fused forwards.

A decoder layer is fused as a whole where that is asked for and proven, else in parts: attention (or
its projections alone), MLP, norms. What is fused, at which level, and why the rest is not, is
recorded per operation and module.
"""

import inspect
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.patches.adapters import adapter_parameters
from lorafuse.patches.attention import (
    FusedAttention,
    FusedOutputProjection,
    FusedProjection,
    Pairing,
    SharedProjections,
)
from lorafuse.patches.bind import Binding, FusedForward, Unsupported, check_own_forwards
from lorafuse.patches.checkpointing import Checkpointing, CheckpointingRecord
from lorafuse.patches.decoder_layer import FusedDecoderLayer
from lorafuse.patches.documents import DocumentFinder
from lorafuse.patches.fp8 import OPERATION as FP8
from lorafuse.patches.fp8 import Fp8Noise, Fp8Record, Group, measure_noise, switch_on
from lorafuse.patches.label_places import LabelPlaces, WatchedLabels
from lorafuse.patches.layer_graphs import GraphRecord, LayerGraphs
from lorafuse.patches.layer_graphs import why_not as why_no_graphs
from lorafuse.patches.loss import (
    FusedCausalLoss,
    recognise_causal_head,
    verify_causal_loss,
    verify_log_probs,
)
from lorafuse.patches.mlp import FusedMlp
from lorafuse.patches.modes import AUTO, OFFLOAD
from lorafuse.patches.moe import FusedExperts, call_experts, ignored_adapters, small_copy
from lorafuse.patches.norms import FusedRmsNorm
from lorafuse.patches.padding_free import OPERATION as PADDING_FREE
from lorafuse.patches.padding_free import PaddingFree, verify_padding_free
from lorafuse.patches.positions import PositionLimit
from lorafuse.patches.probe import (
    TOKENS,
    Calls,
    LayerCall,
    last_position,
    record_far_calls,
    record_layer_calls,
    record_other_calls,
    record_vision_calls,
)
from lorafuse.patches.signature import layer_indexes, plain, signature
from lorafuse.patches.structure import (
    BUILTIN_STRUCTURES,
    NO_ATTENTION,
    NO_GATED_MLP,
    NO_OUTPUT_PROJECTION,
    NO_RMS_NORM,
    Attention,
    DecoderLayer,
    Description,
    Experts,
    GatedMlp,
    Projections,
    Recogniser,
    RmsNorm,
    in_out,
    recognise_experts,
)
from lorafuse.patches.verify import CallBlock, depends_on_index, verify
from lorafuse.patches.weight_room import OPERATION as FOLDED_WEIGHTS
from lorafuse.patches.weight_room import WeightRoomRecord, make_rooms
from lorafuse.patches.weights import BUILTIN_WEIGHT_FORMATS, WeightFormat

__all__ = [
    "BUILTIN_STRUCTURES",
    "BUILTIN_WEIGHT_FORMATS",
    "OPERATIONS",
    "FusedModel",
    "OperationRecord",
    "apply",
]

OPERATIONS = (
    "lora_mlp",
    "lora_qkv",
    "lora_o",
    "rms_norm",
    "rope",
    "moe",
    "attention",
    "cross_entropy",
)
_NOT_WHOLE = "no decoder layer is fused whole here; the trainer's own checkpointing holds"
# A block that is not as it seems from fewer positions on is not fused.
_LEAST_LIMIT = 64
_SEES = "it is not of the text tower; the trainer's own checkpointing holds"
_NOT_CALLED = "no forward on text alone calls it, nor one of its vision tower on pixel_values alone"
_NO_ADAPTERS = "the model has no LoRA adapters"
_NOTHING = {
    "lora_mlp": NO_GATED_MLP,
    "lora_qkv": NO_ATTENTION,
    "lora_o": NO_OUTPUT_PROJECTION,
    "rms_norm": NO_RMS_NORM,
    "rope": NO_ATTENTION,
}


@dataclass
class OperationRecord:
    """What became of one operation on one module.

    Attributes:
        operation: one of `OPERATIONS`, or a third party's.
        module: qualified name; "" where nothing in the model offers itself.
        fused: whether the fused form is bound.
        level: "layer", "part", or "" where not fused.
        reason: why it is not fused; "" where it is.
        forward: the fused forward that performs it.
    """

    operation: str
    module: str
    fused: bool
    level: str = ""
    reason: str = ""
    forward: FusedForward | None = None

    @property
    def calls(self) -> int:
        """How often the fused path has run."""
        return 0 if self.forward is None else self.forward.calls

    @property
    def stock_calls(self) -> dict[str, int]:
        """reason -> how often a call went the stock way although the module is fused."""
        return {} if self.forward is None else dict(self.forward.stock_calls)


Record = OperationRecord | Fp8Record | CheckpointingRecord | GraphRecord | WeightRoomRecord


@dataclass
class FusedModel:
    """The outcome of `apply`, and the way back."""

    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    binding: Binding = field(default_factory=Binding)
    fp8_noise: Fp8Noise | None = None
    checkpointing: Checkpointing | None = None
    # Blocks that were copied and compared with stock, and the time that finding and proving took.
    proofs: int = 0
    proving_s: float = 0.0

    def masks(self) -> dict[str, int]:
        """What became of attention masks: how many calls of attention went which way."""
        ways: Counter[str] = Counter()
        for forward in self.binding.forwards():
            if isinstance(forward, FusedDecoderLayer | FusedAttention):
                ways += forward.attention.ways
        return dict(ways)

    def unfuse(self) -> None:
        """Restores every module's forward exactly; raises RuntimeError where that is impossible."""
        self.binding.undo()
        if self.checkpointing is not None:
            self.checkpointing.undo()
        for record in self.records:
            if isinstance(record, WeightRoomRecord) and record.room is not None:
                record.room.undo()
            if isinstance(record, GraphRecord) and record.graphs is not None:
                record.graphs.forget()  # whoever keeps the report does not keep a step's memory


@dataclass(frozen=True, eq=False)
class _Found:
    name: str
    description: Description
    recogniser: Recogniser


@dataclass(frozen=True)
class _Proof:
    """Why a block is not fused, or None; RoPE's pairing; the position from which it is not."""

    reason: str | None
    pairing: Pairing = Pairing.HALVES
    below: int | None = None


class _FarCalls:
    """The calls of a model's layers at positions far out, recorded where they are asked for."""

    def __init__(self, backbone: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.backbone, self.layers = backbone, layers
        self.recorded: dict[int, Calls] = {}

    def at(self, end: int, holder: nn.Module) -> dict[str, LayerCall]:
        """{what it is: the call with the last positions before `end`}, or {}."""
        if end not in self.recorded:
            self.recorded[end] = record_far_calls(self.backbone, self.layers, end)
        call = self.recorded[end].get(holder)
        return {} if call is None else {f"at positions up to {end - 1}": call}

    def attempt(
        self, prove: Callable[[Mapping[str, LayerCall]], str | None], holder: nn.Module
    ) -> tuple[str | None, int | None]:
        """(the proof's reason or None, the position below which it holds or None: everywhere).

        Where it fails for the last positions alone, powers of two below them are tried in turn.
        """
        end = last_position(self.backbone) if self.layers else 0
        far = self.at(end, holder) if end else {}
        first = prove(far)
        if first is None or not far or not any(what in first for what in far):
            return first, None
        end = 1 << (end - 1).bit_length() - 1
        while end >= _LEAST_LIMIT:
            if prove(self.at(end, holder)) is None:
                return None, end
            end //= 2
        return first, None


class _Applier:
    """One run of `apply`."""

    def __init__(
        self,
        model: nn.Module,
        enabled: Mapping[str, bool],
        structures: Sequence[Recogniser],
        formats: Sequence[WeightFormat],
        backend: str,
        fp8: bool,
        checkpointing: str,
        budget_bytes: float | None,
        host_limit_bytes: float | None,
        graphs: bool,
        folded_weights: bool,
        padding_free: bool,
    ) -> None:
        self.model, self.enabled, self.fp8, self.graphs = model, enabled, fp8, graphs
        self.folds_weights, self.padding_free = folded_weights, padding_free
        self.checkpointing = Checkpointing(checkpointing, budget_bytes, host_limit_bytes)
        self.groups: list[Group] = []
        self.structures, self.formats, self.backend = structures, formats, backend
        self.places = LabelPlaces()
        self.finder = DocumentFinder(self.places)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.result = FusedModel()
        self.claimed: set[int] = set()
        self.verified: dict[Hashable, _Proof] = {}
        self.signatures: dict[int, Hashable] = {}
        self.calls: Calls = {}
        self.other_calls: dict[str, Calls] = {}
        self.far = _FarCalls(model, [])
        self.limits: dict[int, PositionLimit] = {}
        self.indexes: dict[Hashable, set[int]] = {}
        self.by_index: dict[Hashable, bool] = {}
        self.why_parts: dict[str, str] = {}
        # Layers of vision towers, and why a tower could not be tried.
        self.seeing: set[nn.Module] = set()
        self.why_unseen: dict[nn.Module, str] = {}

    def asks(self, *operations: str) -> bool:
        return all(self.enabled.get(operation, False) for operation in operations)

    def record(self, operation: str, module: nn.Module, reason: str) -> None:
        if self.asks(operation):
            name = self.names.get(id(module), "")
            self.result.records.append(OperationRecord(operation, name, False, reason=reason))

    def fuse(self, forward: FusedForward, operation: str, module: nn.Module, level: str) -> None:
        name = self.names.get(id(module), "")
        if self.asks(operation):
            self.result.records.append(
                OperationRecord(operation, name, True, level, forward=forward)
            )

    def run(self) -> FusedModel:
        found = list(self.find())
        if not adapter_parameters(self.model):
            for operation in OPERATIONS:
                self.record(operation, nn.Identity(), _NO_ADAPTERS)
            if self.fp8:
                self.result.records.append(Fp8Record("", _NO_ADAPTERS))
            if self.checkpointing.mode != AUTO:
                self.result.records.append(CheckpointingRecord("", reason=_NO_ADAPTERS))
            if self.graphs:
                self.result.records.append(GraphRecord("", reason=_NO_ADAPTERS))
            if self.folds_weights:
                self.result.records.append(WeightRoomRecord("", _NO_ADAPTERS))
            if self.padding_free:
                self.result.records.append(
                    OperationRecord(PADDING_FREE, "", False, reason=_NO_ADAPTERS)
                )
            return self.result
        started = time.perf_counter()
        for module in {f.description.module for f in found}:
            self.indexes.setdefault(self.sign(module), set()).update(layer_indexes(module))
        layers = [f for f in found if isinstance(f.description, DecoderLayer)]
        padded = self.why_padded() if self.padding_free else None
        self.probe(layers, [f for f in found if isinstance(f.description, Attention)])
        for f in layers:
            self.layer(f)
        for kind, fuse_one in (
            (Attention, self.attention),
            (Projections, self.projections),
            (GatedMlp, self.mlp),
            (Experts, self.experts),
            (RmsNorm, self.norm),
        ):
            for f in found:
                if isinstance(f.description, kind) and id(f.description.module) not in self.claimed:
                    fuse_one(f)
        self.causal_loss()
        self.watch_labels()
        self.checkpoint(layers)
        if self.padding_free:
            self.leave_padding_out(padded)
        if self.graphs:
            self.record_graphs(layers)
        self.report_nothing()
        self.result.proving_s = time.perf_counter() - started
        if self.fp8:
            self.switch_fp8_on()
        if self.folds_weights:
            self.fold_weights()
        for reason, name in self.why_parts.items():
            self.result.notes.append(
                f"decoder layers are fused in parts, not whole ({name}): {reason}"
            )
        return self.result

    def find(self) -> Iterator[_Found]:
        """Every recognised block whose surroundings carry an adapter; outermost first.

        Experts also elsewhere: they are large, and gradients pass through them to what is below.
        """
        parents = {id(c): m for m in self.model.modules() for c in m.children()}
        carries: dict[int, bool] = {}
        for name, module in self.model.named_modules():
            parent = parents.get(id(module), module)
            if id(parent) not in carries:
                carries[id(parent)] = adapter_parameters(parent)
            for recogniser in self.structures:
                if not carries[id(parent)] and recogniser is not recognise_experts:
                    continue
                description = recogniser(module)
                if description is not None:
                    yield _Found(name, description, recogniser)

    def core(self) -> Any:
        """The model under PEFT."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def backbone(self) -> Any:
        """The model under its head; all of it where there is no such part."""
        core = self.core()
        return getattr(core, getattr(core, "base_model_prefix", "") or "model", core)

    def probe(self, layers: Sequence[_Found], attentions: Sequence[_Found]) -> None:
        """Records how the decoder layers are called, and whatever else holds an attention."""
        if not self.asks("lora_qkv", "lora_o", "rope"):
            return
        known = [f.description.module for f in layers]
        inside = {id(m) for layer in known for m in layer.modules()}
        apart = [f for f in attentions if id(f.description.module) not in inside]
        others = {id(f): self.model.get_submodule(f.name.rpartition(".")[0]) for f in apart}
        backbone = self.backbone()
        first = next((f.name for f in (*layers, *apart)), "")
        for modules in (dict.fromkeys([*known, *others.values()]), dict.fromkeys(known)):
            if not modules:
                continue
            try:
                self.calls = record_layer_calls(backbone, list(modules))
                self.other_calls = record_other_calls(backbone, list(modules))
                self.far = _FarCalls(backbone, list(modules))
                break
            except Unsupported as unsupported:
                self.why_parts.setdefault(unsupported.reason, first)
        self.probe_vision(dict.fromkeys([*known, *others.values()]))

    def probe_vision(self, layers: Iterable[nn.Module]) -> None:
        """The same of those layers that a forward on text did not call, with an image."""
        towers: dict[nn.Module, list[nn.Module]] = {}
        for layer in layers:
            tower = None if layer in self.calls else self.tower(layer)
            if tower is not None:
                towers.setdefault(tower, []).append(layer)
        for tower, its_layers in towers.items():
            try:
                found = record_vision_calls(tower, its_layers)
            except Unsupported as unsupported:
                self.why_unseen |= dict.fromkeys(its_layers, unsupported.reason)
            else:
                self.calls |= found
                self.seeing |= set(found)

    def tower(self, layer: nn.Module) -> nn.Module | None:
        """The innermost model around a layer, if that is one that looks at images."""
        name = self.names[id(layer)]
        while name:
            name = name.rpartition(".")[0]
            around = self.model.get_submodule(name)
            if hasattr(type(around), "base_model_prefix"):
                looks = type(around).main_input_name == "pixel_values"  # type: ignore[attr-defined]
                return around if looks and around is not self.core() else None
        return None

    # One level at a time: propose, prove, bind.

    def sign(self, module: nn.Module) -> Hashable:
        """The module's signature, before anything is bound."""
        if id(module) not in self.signatures:
            self.signatures[id(module)] = signature(module)
        return self.signatures[id(module)]

    def place(
        self,
        module: nn.Module,
        call: CallBlock,
        hidden_size: int,
        shape: Sequence[int] = TOKENS,
    ) -> Hashable:
        """The block's place in the model where that changes what it computes, else ()."""
        own, key = layer_indexes(module), self.sign(module)
        if len(own) != 1:
            return own
        if key not in self.by_index:
            others = sorted(self.indexes[key] - set(own))
            self.by_index[key] = bool(others) and depends_on_index(
                module, call, hidden_size, others, shape
            )
        return own if self.by_index[key] else ()

    def prove(
        self, f: _Found, build: Callable[..., Sequence[FusedForward]], holder: nn.Module
    ) -> _Proof:
        """What is found out about the block, once per distinct block.

        Args:
            f: a decoder layer or an attention.
            build: makes its fused forwards.
            holder: the module whose recorded calls it is tried with: itself, or what it stands in.
        """
        module, recorded = f.description.module, self.calls[holder]
        if recorded.hidden_states.dim() != 3:
            shape = list(recorded.hidden_states.shape)
            return _Proof(f"its hidden states are {shape}, not a batch of rows")
        call = partial(_call_layer, recorded)
        (*shape, hidden_size), dtype = recorded.hidden_states.shape, recorded.hidden_states.dtype
        place = self.place(module, call, hidden_size, shape)
        arguments = plain(recorded.kwargs, small=64)
        key = (self.sign(module), place, arguments, type(f.description), dtype)
        if key in self.verified:
            return self.verified[key]
        kinds = {what: calls[holder] for what, calls in self.other_calls.items() if holder in calls}
        proof = _Proof("it was not tried")
        for pairing in Pairing:

            def bind(replica: nn.Module, binding: Binding, pairing: Pairing = pairing) -> None:
                for forward in build(f.recogniser(replica), pairing):
                    binding.bind(forward.module, forward)

            def attempt(
                more: Mapping[str, LayerCall], bind: Callable[..., None] = bind
            ) -> str | None:
                others = {
                    what: partial(_call_layer, other)
                    for what, other in {**kinds, **more}.items()
                    if other.hidden_states.shape == recorded.hidden_states.shape
                }
                return self.timed(module, bind, call, hidden_size, dtype, shape, others)

            try:
                build(f.description, pairing)  # what it cannot read needs no proof
                reason, below = self.far.attempt(attempt, holder)
            except Unsupported as unsupported:
                reason, below = unsupported.reason, None
            if reason is None:
                proof = _Proof(None, pairing, below)
                break
            if pairing is next(iter(Pairing)):
                proof = _Proof(reason)
        self.verified[key] = proof
        return proof

    def hold(self, forward: FusedForward, proof: _Proof, call: LayerCall) -> None:
        """Holds a fused forward to what was proven."""
        limit = None
        if proof.below is not None:
            limit = self.limits.setdefault(proof.below, PositionLimit(proof.below))
            note = (
                f"from position {proof.below} on, {type(forward.module).__name__} computes "
                "something else than it is fused as: batches that reach it go the stock way"
            )
            if note not in self.result.notes:
                self.result.notes.append(note)
        forward.prove_for(call.kwargs, limit)

    def timed(self, *args: Any, **kwargs: Any) -> str | None:
        """`verify`, counted."""
        self.result.proofs += 1
        return verify(*args, **kwargs)

    def bind(self, forwards: Sequence[FusedForward]) -> None:
        for forward in forwards:
            self.result.binding.bind(forward.module, forward)
            for readers in forward.linear_groups():
                self.groups.append((self.names.get(id(readers[0].module), ""), readers))

    def checkpoint(self, layers: Sequence[_Found]) -> None:
        """Has the layers that are fused whole keep their activations as asked for."""
        chosen = self.checkpointing
        for f in layers:
            module = f.description.module
            forward = module.__dict__.get("forward")
            if module in self.seeing:
                if chosen.mode != AUTO:
                    self.result.records.append(CheckpointingRecord(f.name, reason=_SEES))
            elif isinstance(forward, FusedDecoderLayer):
                forward.checkpointing = chosen.add(
                    module, forward.sizes(), forward.attention.repeats
                )
                record = CheckpointingRecord(f.name, forward.checkpointing)
                self.result.records.append(record)
            elif chosen.mode != AUTO:
                self.result.records.append(CheckpointingRecord(f.name, reason=_NOT_WHOLE))
        if not layers and chosen.mode != AUTO:
            self.result.records.append(CheckpointingRecord("", reason=_NOT_WHOLE))
        if chosen.layers:
            self.result.checkpointing = chosen
            head = getattr(self.model, "get_output_embeddings", lambda: None)()
            chosen.vocabulary = getattr(head, "out_features", chosen.vocabulary)
            replaced = chosen.replace_trainers()
            moved = chosen.move_embeddings(self.core())
            self.result.notes += [line for line in (replaced, moved) if line is not None]
        self.result.notes += self.idle_memory_flags()

    def why_padded(self) -> str | None:
        """Why the backbone is not called without padding, or None; before anything is bound."""
        config, backbone = getattr(self.core(), "config", None), self.backbone()
        if config is None or backbone is self.core():
            return f"{type(self.core()).__name__} is not a backbone with a head on top"
        if config.get_text_config() is not config:
            return "it is a model of more than text"
        return verify_padding_free(backbone)

    def leave_padding_out(self, reason: str | None) -> None:
        """Calls the backbone without padding, where its attention takes documents for what they
        are."""
        backbone = self.backbone()
        name = self.names.get(id(backbone), "")
        served = sum(
            isinstance(forward, FusedDecoderLayer | FusedAttention)
            for forward in self.result.binding.forwards()
        )
        layers = getattr(self.core().config, "num_hidden_layers", None)
        if reason is None and served != layers:
            reason = f"attention is fused in {served} of {layers} layers"
        if reason is None and "forward" in backbone.__dict__:
            reason = f"the forward of its {type(backbone).__name__} was replaced already"
        if reason is not None:
            self.result.records.append(OperationRecord(PADDING_FREE, name, False, reason=reason))
            return
        forward = PaddingFree(backbone, self.places)
        self.bind([forward])
        self.result.records.append(OperationRecord(PADDING_FREE, name, True, forward=forward))

    def record_graphs(self, layers: Sequence[_Found]) -> None:
        """Has the text tower's layers replayed as CUDA graphs: all of them, or none."""
        layers = [f for f in layers if f.description.module not in self.seeing]
        forwards = [f.description.module.__dict__.get("forward") for f in layers]
        whole = [one for one in forwards if isinstance(one, FusedDecoderLayer)]
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        reason = why_no_graphs(device)
        if not whole or len(whole) != len(forwards):
            reason = "not every decoder layer is fused whole"
        if reason is not None:
            self.result.records.append(GraphRecord("", reason=reason))
            return
        graphs = LayerGraphs()
        graphs.layers = whole
        for f, forward in zip(layers, whole, strict=True):
            forward.graphs = graphs
            self.result.records.append(GraphRecord(f.name, graphs))

    def idle_memory_flags(self) -> Iterator[str]:
        """What was asked of memory and has no effect here, and why."""
        chosen = self.checkpointing
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        for flag, value in (
            ("fused_memory_gb", chosen.budget_bytes),
            ("fused_host_gb", chosen.host_limit_bytes),
        ):
            if value is not None and not chosen.layers:
                yield f"{flag} has no effect: {_NOT_WHOLE}"
            elif value is not None and device != "cuda":
                yield f"{flag} has no effect: it is for a GPU, and the model is on the {device}"
        if chosen.mode == OFFLOAD and chosen.layers and device != "cuda":
            yield f"fused_checkpointing: offload is selective here: the model is on the {device}"

    def switch_fp8_on(self) -> None:
        """After every proof, which is of the model's own dtype."""
        records = switch_on(self.groups, self.names)
        self.result.records += records
        on = sum(record.fused for record in records)
        if not on:
            note = f"{FP8}: no layer computes in FP8: {records[0].reason}"
        else:
            self.result.fp8_noise = measure_noise(self.groups)
            note = (
                f"{FP8}: the base GEMMs of {on} linear layers compute in FP8 (e4m3). Verification "
                "has proven the fused blocks without it; what FP8 adds is noise. Signal to noise "
                f"of the products on random input: {self.result.fp8_noise or 'not measured'}"
            )
        self.result.notes.append(note)

    def fold_weights(self) -> None:
        """After `switch_fp8_on`, for what computes in FP8 is written anew in each pass."""
        records = make_rooms(self.model, (readers for _, readers in self.groups), self.names)
        self.result.records += records
        count = sum(record.fused for record in records)
        self.result.notes.append(
            f"fused_{FOLDED_WEIGHTS}: the base weights of {count} linear layers become views of "
            "buffers with room for LoRA in the first training step; unfuse() gives them their own "
            "memory again"
            if count
            else f"fused_{FOLDED_WEIGHTS}: no weight moves: {records[0].reason}"
        )

    def hidden_dtype(self, module: nn.Module) -> torch.dtype:
        for layer, call in self.calls.items():
            if module is layer or any(module is m for m in layer.modules()):
                return call.hidden_states.dtype
        for parameter in module.parameters():
            if parameter.is_floating_point() and not parameter.requires_grad:
                return parameter.dtype
        return torch.float32

    def build_layer(self, layer: DecoderLayer, pairing: Pairing) -> list[FusedDecoderLayer]:
        check_own_forwards(layer.module)
        return [FusedDecoderLayer(layer, self.formats, pairing, self.backend, self.finder)]

    def layer(self, f: _Found) -> None:
        layer = f.description
        assert isinstance(layer, DecoderLayer)
        if not self.asks(*FusedDecoderLayer.operations):
            return
        call = self.calls.get(layer.module)
        if call is None:
            return
        proof = self.prove(f, self.build_layer, layer.module)
        if proof.reason is not None:
            self.why_parts.setdefault(proof.reason, f.name)
            return
        try:
            (forward,) = self.build_layer(layer, proof.pairing)
        except Unsupported as unsupported:
            self.why_parts.setdefault(unsupported.reason, f.name)
            return
        self.hold(forward, proof, call)
        self.bind([forward])
        attention, mlp = layer.attention, layer.mlp
        norms = [layer.attention_norm, layer.mlp_norm]
        norms += [n for n in (layer.attention_post_norm, layer.mlp_post_norm) if n is not None]
        norms += [n for n in (attention.q_norm, attention.k_norm) if n is not None]
        self.fuse(forward, "lora_mlp", mlp.module, "layer")
        for operation in ("lora_qkv", "lora_o", "rope"):
            self.fuse(forward, operation, attention.module, "layer")
        for norm in norms:
            self.fuse(forward, "rms_norm", norm.module, "layer")
        self.backend_record(forward, attention.module, "layer")
        self.claimed |= {id(m) for m in layer.module.modules()}

    def build_attention(self, attention: Attention, pairing: Pairing) -> list[FusedAttention]:
        check_own_forwards(attention.module)
        return [FusedAttention(attention, self.formats, pairing, self.backend, self.finder)]

    def attention(self, f: _Found) -> None:
        attention = f.description
        assert isinstance(attention, Attention)
        if not self.asks("lora_qkv", "lora_o", "rope"):
            return
        holder = next((m for m in self.calls if attention.module in list(m.modules())), None)
        try:
            if holder is None:
                around = (r for m, r in self.why_unseen.items() if attention.module in m.modules())
                raise Unsupported(next(around, next(iter(self.why_parts), _NOT_CALLED)))
            proof = self.prove(f, self.build_attention, holder)
            if proof.reason is not None:
                raise Unsupported(proof.reason)
            (forward,) = self.build_attention(attention, proof.pairing)
        except Unsupported as unsupported:
            reason = f"attention is not fused as a block: {unsupported.reason}"
            self.record("rope", attention.module, reason)
            return
        self.hold(forward, proof, self.calls[holder])
        self.bind([forward])
        for operation in forward.operations:
            self.fuse(forward, operation, attention.module, "part")
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None:
                self.fuse(forward, "rms_norm", norm.module, "part")
        self.backend_record(forward, attention.module, "part")
        self.claimed |= {id(m) for m in attention.module.modules()}

    def projections(self, f: _Found) -> None:
        projections = f.description
        assert isinstance(projections, Projections)
        for operation in ("lora_qkv", "lora_o"):
            if operation == "lora_o" and projections.o is None:
                continue
            part = _Part(self, projections, operation)
            self.part(f, part.build, part.call, operation, part.hidden_size)
        name = self.names.get(id(projections.module), "")
        if any(r.operation == "rope" and r.module == name for r in self.result.records):
            return
        if self.asks("lora_qkv", "lora_o"):
            reason = (
                "attention is not fused as a block, only its projections: it is not q/k/v, norms "
                "on each head, RoPE, attention and o in this order"
            )
        else:
            reason = "RoPE is fused only together with fused_lora_qkv and fused_lora_o"
        self.record("rope", projections.module, reason)

    def build_mlp(self, mlp: GatedMlp, _: Pairing) -> list[FusedMlp]:
        check_own_forwards(mlp.module)
        return [FusedMlp(mlp, self.formats)]

    def mlp(self, f: _Found) -> None:
        mlp = f.description
        assert isinstance(mlp, GatedMlp)
        self.part(
            f,
            self.build_mlp,
            lambda block, h: [block.forward(h)],
            "lora_mlp",
            in_out(mlp.gate_up[0])[0],
        )

    def experts(self, f: _Found) -> None:
        experts = f.description
        assert isinstance(experts, Experts)
        module = experts.module
        self.claimed |= {id(m) for m in module.modules()}
        if not self.asks("moe"):
            return
        key = "moe", self.sign(module)
        if key not in self.verified:
            self.verified[key] = _Proof(self.prove_experts(f, experts))
        reason = self.verified[key].reason
        if reason is not None:
            self.record("moe", module, reason)
            return
        try:
            forward = FusedExperts(experts)
        except Unsupported as unsupported:
            self.record("moe", module, unsupported.reason)
            return
        self.bind([forward])
        self.fuse(forward, "moe", module, "part")

    def prove_experts(self, f: _Found, experts: Experts) -> str | None:
        """Why the experts are not fused, or None; computed once per distinct block."""

        def bind(replica: nn.Module, binding: Binding) -> None:
            binding.bind(replica, FusedExperts(f.recogniser(replica)))

        try:
            hidden = FusedExperts(experts).gate_up.in_features
            dtype = self.hidden_dtype(experts.module)
            reason = self.timed(small_copy(experts), bind, call_experts, hidden, dtype)
        except Unsupported as unsupported:
            return unsupported.reason
        return ignored_adapters(experts) if reason is None else reason

    def build_norm(self, norm: RmsNorm, _: Pairing) -> list[FusedRmsNorm]:
        check_own_forwards(norm.module)
        return [FusedRmsNorm(norm)]

    def norm(self, f: _Found) -> None:
        norm = f.description
        assert isinstance(norm, RmsNorm)
        self.part(
            f,
            self.build_norm,
            lambda block, h: [block.forward(h)],
            "rms_norm",
            norm.weight.numel(),
        )

    def part(
        self,
        f: _Found,
        build: Callable[..., Sequence[FusedForward]],
        call: Callable[[nn.Module, Tensor], Sequence[Tensor]],
        operation: str,
        hidden_size: int,
    ) -> None:
        """Proves and binds one operation of a block on its own."""
        if not self.asks(operation):
            return
        module = f.description.module
        # q, k, v and o are tried one by one, without the module that holds them
        alone = isinstance(f.description, Projections)
        key = (
            operation,
            self.sign(module),
            self.hidden_dtype(module),
            () if alone else self.place(module, call, hidden_size),
        )
        if key not in self.verified:
            self.verified[key] = _Proof(self.prove_part(f, build, call, hidden_size))
        reason = self.verified[key].reason
        if reason is None:
            try:
                forwards = build(f.description, Pairing.HALVES)
            except Unsupported as unsupported:
                reason = unsupported.reason
        if reason is not None:
            self.record(operation, module, reason)
            return
        self.bind(forwards)
        self.fuse(forwards[0], operation, module, "part")

    def prove_part(
        self,
        f: _Found,
        build: Callable[..., Sequence[FusedForward]],
        call: Callable[[nn.Module, Tensor], Sequence[Tensor]],
        hidden_size: int,
    ) -> str | None:
        def bind(replica: nn.Module, binding: Binding) -> None:
            for forward in build(f.recogniser(replica), Pairing.HALVES):
                binding.bind(forward.module, forward)

        module = f.description.module
        try:
            build(f.description, Pairing.HALVES)
            dtype = self.hidden_dtype(module)
            return self.timed(module, bind, call, hidden_size, dtype)
        except Unsupported as unsupported:
            return unsupported.reason

    def backend_record(
        self, forward: FusedDecoderLayer | FusedAttention, module: nn.Module, level: str
    ) -> None:
        """Whether this attention's backend order is changed on this device."""
        if not self.asks("attention"):
            return
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        if forward.attention.prefers_cudnn(torch.empty(0, device=device)):
            self.fuse(forward, "attention", module, level)
        else:
            note = (
                "attention: the backend is left to torch and transformers (cuDNN is preferred only "
                "for attn_implementation=sdpa with fused_attention=auto on Hopper and newer GPUs)"
            )
            if self.backend == "auto":
                note += "; under sdpa, packed and right-padded batches train without the dense mask"
            if note not in self.result.notes:
                self.result.notes.append(note)

    def causal_loss(self) -> None:
        if not self.asks("cross_entropy"):
            return
        core = self.core()
        head = recognise_causal_head(core)
        reason = head if isinstance(head, str) else verify_causal_loss(head)
        if reason is not None:
            self.record("cross_entropy", core, reason)
            return
        assert not isinstance(head, str)
        forward = FusedCausalLoss(head, self.places)
        forward.no_log_probs = verify_log_probs(head)
        self.bind([forward])
        self.fuse(forward, "cross_entropy", core, "part")

    def watch_labels(self) -> None:
        """Of a causal LM whose loss is not fused, for the attention that asks where labels are."""
        core, forwards = self.core(), self.result.binding.forwards()
        takes = "labels" in inspect.signature(core.forward).parameters
        if takes and any(isinstance(one, FusedDecoderLayer | FusedAttention) for one in forwards):
            if not any(isinstance(one, FusedCausalLoss) for one in forwards):
                self.bind([WatchedLabels(core, self.places)])

    def report_nothing(self) -> None:
        """One record for each operation that no module of the model offers."""
        seen = {record.operation for record in self.result.records}
        core = self.core()
        for operation, what in _NOTHING.items():
            if self.asks(operation) and operation not in seen:
                reason = f"{what} was found in {type(core).__name__}"
                self.record(operation, nn.Identity(), reason)


class _Part:
    """q, k and v, or o, of a module: how they are built and called on their own."""

    def __init__(self, applier: _Applier, projections: Projections, operation: str) -> None:
        self.formats, self.operation = applier.formats, operation
        own = projections.qkv if operation == "lora_qkv" else (projections.o,)
        linears = [linear for linear in own if linear is not None]
        self.hidden_size = in_out(linears[0])[0]
        self.paths = [
            next(n for n, m in projections.module.named_modules() if m is linear)
            for linear in linears
        ]

    def build(self, projections: Projections, _: Pairing) -> list[FusedForward]:
        if self.operation == "lora_o":
            return [FusedOutputProjection(projections, self.formats)]
        shared = SharedProjections(projections, self.formats)
        return [FusedProjection(shared, i) for i in range(len(shared.readers))]

    def call(self, block: nn.Module, h: Tensor) -> list[Tensor]:
        return [block.get_submodule(path).forward(h) for path in self.paths]


def _call_layer(call: LayerCall, block: nn.Module, h: Tensor) -> list[Tensor]:
    """Runs a decoder layer or its attention with the recorded arguments, floats in `h`'s dtype."""

    def fit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(h.dtype) if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(fit(item) for item in value)
        return value

    output = block.forward(hidden_states=h, **{k: fit(v) for k, v in call.kwargs.items()})
    outputs = output if isinstance(output, tuple) else (output,)
    found = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad][:1]
    if call.kept is None:
        return found
    return [o.masked_fill(~call.kept[..., None], 0.0) for o in found]


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    """torch's, Python's and numpy's generators as before afterwards: stock forwards may draw."""
    cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    numpy: Any = sys.modules.get("numpy")
    ours, theirs = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(ours)
        if numpy:
            numpy.random.set_state(theirs)


def apply(
    model: nn.Module,
    enabled: Mapping[str, bool],
    structures: Sequence[Recogniser] = BUILTIN_STRUCTURES,
    weight_formats: Sequence[WeightFormat] = BUILTIN_WEIGHT_FORMATS,
    attention: str = "auto",
    fp8: bool = False,
    checkpointing: str = AUTO,
    budget_bytes: float | None = None,
    host_limit_bytes: float | None = None,
    graphs: bool = False,
    folded_weights: bool = False,
    padding_free: bool = False,
) -> FusedModel:
    """Binds fused forwards on the instances of `model`, each proven first.

    Args:
        model: a PEFT model, or a model with PEFT layers in it; not wrapped by DDP or the like.
        enabled: operation name -> whether it is asked for.
        structures: recognisers, tried on every module in this order.
        weight_formats: readers of base weights.
        attention: "auto" (prefer cuDNN's attention where it is faster) or "sdpa" (torch's order).
        fp8: base GEMMs in FP8 where this GPU can; never by default, for it is coarser than bf16.
        checkpointing: what decoder layers keep for backward, a mode of `checkpointing`.
        budget_bytes: of GPU memory, for `auto`; None: what there is.
        host_limit_bytes: of the host's, for activations; None: what there is.
        graphs: replay decoder layers as CUDA graphs where batches keep one shape.
        folded_weights: base weights of the compute dtype move into buffers with room for LoRA.
        padding_free: layers compute a padded batch without its padding.

    Returns:
        What was fused, what not and why, and the way back.
    """
    applier = _Applier(
        model, enabled, structures, weight_formats, attention, fp8, checkpointing, budget_bytes,
        host_limit_bytes, graphs, folded_weights, padding_free,
    )  # fmt: skip
    try:
        with _random_states(model):
            return applier.run()
    except BaseException:
        applier.result.unfuse()
        raise
