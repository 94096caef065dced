"""Decoder layers replayed as CUDA graphs, where the host cannot keep up with the GPU.

A fused layer is some 60 launches a step, and a batch of few tokens is computed before the host has
issued the next of them. Recorded once, they are issued as four graphs a layer:

    forward    [norm 1, q/k/v, RoPE]    attention    [o, norm 2, MLP]
    backward   [o, norm 2, MLP]    attention    [norm 1, q/k/v, RoPE]

Attention itself runs as ever, so that masks, packed documents and any attention function are
served. What a graph reads and writes lies where it lay when it was recorded: inputs are copied
there unless they lie there already, as the output of the layer before does; activations stay in the
graphs' own memory pool, of the size that a plain step needs for them.

A set of graphs is recorded for a batch shape that has come `WARM` times, and at most `MOST` sets
one after the other: batches of ever new shapes run as ever. So does a forward pass that cannot be
replayed, with its reason counted:

    the graphs' activations are still waiting for their backward pass (two forwards, one backward)
    another adapter is active, another weight stands in a layer's place, or LoRA drops out
    activations are not all kept (`checkpointing`), or nothing requires a gradient

Gradients leave the graphs as copies: what accumulates or hooks them never sees the graphs' memory.

A graph is made by a recorder: `CudaRecorder` here, an emulation in the tests.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.lora_linear import LoraProjection
from lorafuse.kernels.nf4 import Quantised4bit
from lorafuse.patches.hooks import collects_hidden_states
from lorafuse.patches.recomputation import ignore

if TYPE_CHECKING:
    from lorafuse.patches.decoder_layer import FusedDecoderLayer, Prepared

__all__ = [
    "MOST",
    "OPERATION",
    "WARM",
    "CudaRecorder",
    "GraphRecord",
    "LayerGraphs",
    "Recorder",
    "why_not",
]

OPERATION = "graphs"
# Plain steps of one shape before it is recorded: kernels are compiled and tuned by then.
WARM = 3
# Sets of graphs that one run records, each in place of the one before.
MOST = 3

_MOST_KEYS = 1024

Result = TypeVar("Result")


class Recorder(Protocol):
    """Makes graphs that share one pool of memory and are replayed in the order of recording."""

    def record(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """(the replay, what `run` returned: tensors that each replay writes anew)."""

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory, without keeping it from being used again by what is recorded later."""


class _Memory:
    """Memory of the graphs' pool, for `torch.as_tensor` to make a tensor of that owns nothing."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip


class CudaRecorder:
    """CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        # A stream that is recorded cannot have freed what plain steps, or the set of graphs before,
        # have left with the allocator: it would run out of memory instead.
        torch.cuda.empty_cache()
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.generator = torch.cuda.default_generators[index]
        self.drawn = self.generator.clone_state()
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            # Other threads may go on; a loader that pins memory does.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = run()
            except BaseException:
                with suppress(RuntimeError):  # which would say no more than that one failed before
                    graph.capture_end()
                # It would go on waiting for the recording's end, and draw nothing outside of it.
                self.generator.graphsafe_set_state(self.drawn)
                raise
            graph.capture_end()
        current.wait_stream(self.stream)
        return graph.replay, result

    def alias(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=self.device)
        return torch.empty(0, dtype=tensor.dtype, device=self.device).set_(
            memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def why_not(device: torch.device) -> str | None:
    """Why nothing is recorded on `device`, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"CUDA graphs need an NVIDIA GPU; the model is on the {device.type}"
    return None


@dataclass(eq=False)
class _Flat:
    """Gradients of one dtype, behind each other in one tensor."""

    tensor: Tensor
    parts: list[tuple[int, int, torch.Size]]  # (index of the parameter, where it starts, shape)


@dataclass(eq=False)
class _Piece:
    """One recorded stretch of a layer, forward and backward.

    Attributes:
        inputs: where the replay reads.
        outputs: what it writes.
        parameters: those that it reads and that are trained.
        d_outputs: where the backward replay reads the outputs' gradients.
        d_inputs: what it writes, None where that needs no gradient.
        flats: what it writes of the parameters' gradients.
    """

    forward: Callable[[], None]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    backward: Callable[[], None] | None = None
    d_outputs: tuple[Tensor, ...] = ()
    d_inputs: tuple[Tensor | None, ...] = ()
    flats: list[_Flat] = field(default_factory=list)


class _Flight:
    """One forward pass by graphs, until its backward pass is over."""

    def __init__(self) -> None:
        self.has_started = False  # its backward pass
        self.done: set[int] = set()
        # The graphs' copies of cos and sin -> of which they are, for all of this pass.
        self.positions: dict[int, Tensor] = {}

    def takes(self, recorded: "_Recorded", prepared: "Prepared") -> bool:
        """Writes cos and sin where the layer's graphs read them; False: others are there."""
        pairs = list(zip(recorded.positions, prepared.positions or (), strict=True))
        if any(self.positions.get(id(static), given) is not given for static, given in pairs):
            return False
        for static, given in pairs:
            if id(static) not in self.positions:
                _write(static, given)
                self.positions[id(static)] = given
        return True

    def runs(self, piece: _Piece, current: "_Flight | None") -> None:
        """Backward has come to `piece`.

        Raises:
            RuntimeError: Its activations are gone.
        """
        self.has_started = True
        if current is not self or id(piece) in self.done:
            raise RuntimeError(
                "backward runs a second time, or after another forward pass, through a forward "
                "that fused_graphs replayed; its activations are gone. Set fused_graphs: false"
            )
        self.done.add(id(piece))


def _write(static: Tensor, given: Tensor) -> None:
    if given.data_ptr() != static.data_ptr() or given.stride() != static.stride():
        static.copy_(given)


class _Replay(EagerFunction):
    """A piece in autograd's eyes: a function of its inputs and parameters."""

    @staticmethod
    def forward(
        ctx: Any, graphs: "LayerGraphs", flight: _Flight, piece: _Piece, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.graphs, ctx.flight, ctx.piece = graphs, flight, piece
        ctx.set_materialize_grads(False)
        for static, given in zip(piece.inputs, tensors, strict=False):
            _write(static, given)
        piece.forward()
        return tuple(x.data for x in piece.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        piece: _Piece = ctx.piece
        ctx.flight.runs(piece, ctx.graphs.flight())
        assert piece.backward is not None
        for static, dy in zip(piece.d_outputs, dys, strict=True):
            if dy is None:
                static.zero_()
            else:
                _write(static, dy)
        piece.backward()
        gradients: list[Tensor | None] = [None] * len(piece.parameters)
        for flat in piece.flats:
            own = flat.tensor.clone()
            for index, start, shape in flat.parts:
                gradients[index] = own[start : start + shape.numel()].view(shape)
        d_inputs = (None if d is None else d.data for d in piece.d_inputs)
        return None, None, None, *d_inputs, *gradients


@dataclass(eq=False)
class _Recorded:
    """One layer's pieces, and what they were recorded of."""

    before: _Piece
    behind: _Piece
    read: tuple[Any, ...]
    positions: tuple[Tensor, ...]


class LayerGraphs:
    """The graphs of a model's decoder layers.

    Args:
        recorder: makes the recorder for a device; `CudaRecorder` by default.

    Attributes:
        layers: in the order in which the model calls them.
        reasons: why layers ran as ever -> how often.
        replays: layers' forwards that were replayed, in all.
    """

    def __init__(self, recorder: Callable[[torch.device], Recorder] | None = None) -> None:
        self.recorder = recorder or CudaRecorder
        self.layers: list[FusedDecoderLayer] = []
        self.reasons: Counter[str] = Counter()
        self.replays = 0
        self._key: Any = None
        self._recorded: dict[int, _Recorded] = {}
        self._keeps: list[Tensor] = []  # the tensors beside the pool that replays read and write
        self._seen: Counter[Any] = Counter()
        self._sets = 0
        self._last: dict[int, Prepared] = {}
        self._now: _Flight | None = None  # of the forward pass that is running
        self._flight: weakref.ref[_Flight] | None = None
        self._why = ""

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model records its own.
        return {"recorder": self.recorder, "layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["recorder"])  # type: ignore[misc]
        self.layers = state["layers"]

    def forget(self) -> None:
        """Lets the graphs and their memory go."""
        self._key, self._recorded, self._keeps = None, {}, []

    def flight(self) -> _Flight | None:
        """The last forward pass by graphs, if anything of it is left."""
        return None if self._flight is None else self._flight()

    def call(
        self, layer: "FusedDecoderLayer", h: Tensor, prepared: "Prepared", *, keeps_all: bool = True
    ) -> Tensor | None:
        """The layer's output; None where it has to run as ever.

        Args:
            layer: one of `layers`.
            h: its input.
            prepared: the rest of the call.
            keeps_all: whether the layer keeps all its activations in this call.
        """
        if layer is self.layers[0]:
            self._now = None
            self._why = self._begin(h, prepared) or ""
        flight, why = self._now, self._why
        recorded = self._recorded.get(id(layer))
        if not keeps_all:
            why = "its activations are not all kept (fused_checkpointing)"
        elif prepared.cache is not None:
            why = "it fills a KV cache"
        elif flight is not None and (recorded is None or recorded.read != prepared.read()):
            why = "its adapters or weights are not those that were recorded"
        elif flight is not None and recorded is not None and not flight.takes(recorded, prepared):
            why = "its cos and sin are another layer's no longer, as they were when it was recorded"
        if why or flight is None or recorded is None:
            self.reasons[why] += 1
            if keeps_all:
                self._last[id(layer)] = prepared.at(prepared.positions or ())
            return None
        self.replays += 1
        return self._run(layer, flight, recorded, h, prepared)

    def _run(
        self,
        layer: "FusedDecoderLayer",
        flight: _Flight,
        recorded: _Recorded,
        h: Tensor,
        prepared: "Prepared",
    ) -> Tensor:
        before, behind = recorded.before, recorded.behind
        q, k, v, *around = _Replay.apply(  # type: ignore[no-untyped-call]
            self, flight, before, h, *before.parameters
        )
        attended = layer.attend(q, k, v, prepared)
        beside = around[0] if around else h
        (h3,) = _Replay.apply(  # type: ignore[no-untyped-call]
            self, flight, behind, attended, beside, *behind.parameters
        )
        result: Tensor = h3
        return result

    def _begin(self, h: Tensor, prepared: "Prepared") -> str | None:
        """The model's first layer is called: None where this forward is replayed, else why not."""
        if not torch.is_grad_enabled():
            return "no gradient is asked for"
        if collects_hidden_states():
            return "hidden states are collected, which the next forward would overwrite"
        last = self.flight()
        if last is not None and not last.has_started:
            return "the last forward pass by graphs still waits for its backward pass"
        kind = h.device.type
        key = (
            h.shape, h.dtype, h.device, h.requires_grad,
            torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
            *((x.shape, x.dtype) for x in prepared.positions or ()),
        )  # fmt: skip
        if key != self._key:
            if len(self._seen) >= _MOST_KEYS:
                self._seen.clear()
            self._seen[key] += 1
            if self._seen[key] <= WARM:
                return f"a shape is recorded when it comes a {WARM + 1}th time"
            if self._sets >= MOST:
                return f"{MOST} shapes have been recorded: no more are"
            why = self._record(key, h)
            if why is not None:
                self._sets = MOST
                return why
        flight = _Flight()
        self._now, self._flight = flight, weakref.ref(flight)
        return None

    def _record(self, key: Any, h: Tensor) -> str | None:
        """Records all layers for batches as this one; why it could not be done, or None."""
        if any(id(layer) not in self._last for layer in self.layers):
            return "not every layer has run yet"
        last = [self._last[id(layer)] for layer in self.layers]
        if any(p.dropout > 0 and p.A is not None for one in last for p in one.projections()):
            return "LoRA drops out: its masks are drawn anew in each step"
        if any(w.requires_grad for one in last for w in (*one.head_norms, *one.post_norms)):
            return "a norm is trained"
        self.forget()
        self._sets += 1
        try:
            with torch.enable_grad(), _no_garbage():
                recording = _Recording(self.recorder(h.device), self.layers, last, h)
                self._recorded, self._keeps = recording.run(), recording.keeps
        except Exception as error:  # whatever a driver or a compiler has against it
            return f"recording failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        self._key, self._last = key, {}
        return None


@contextmanager
def _no_garbage() -> Iterator[None]:
    """No cycle is collected within.

    What gives memory back to the driver, as pinned buffers do, would break off a recording.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Recording:
    """Forward of all layers, and backward in reverse, each reading what the one before wrote.

    What lies in the pool is referred to by aliases, once it is recorded: so what is recorded later
    may use its memory again, as a plain step does. What a layer still needs is held by its tape.

    Attributes:
        keeps: tensors beside the pool, that have to stay.
    """

    def __init__(
        self,
        recorder: Recorder,
        layers: "Sequence[FusedDecoderLayer]",
        last: "Sequence[Prepared]",
        h: Tensor,
    ) -> None:
        self.recorder, self.layers, self.last, self.h = recorder, layers, last, h
        self.keeps: list[Tensor] = []
        self.positions: dict[int, Tensor] = {}
        self.buffers: dict[Any, Tensor] = {}

    def run(self) -> dict[int, _Recorded]:
        x = self.keep(self.h.detach().clone(memory_format=torch.contiguous_format))
        needs_dx, tapes = self.h.requires_grad, []
        for layer, prepared in zip(self.layers, self.last, strict=True):
            tape = _LayerTape(self, layer, prepared, x, needs_dx)
            tapes.append(tape)
            x, needs_dx = tape.h3.detach(), True
        dy = self.keep(torch.empty_like(x))
        del x
        for tape in reversed(tapes):
            dy = tape.record_backward(dy)
        return {id(tape.layer): tape.recorded for tape in tapes}

    def keep(self, tensor: Tensor) -> Tensor:
        self.keeps.append(tensor)
        return tensor

    def copies(self, positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of cos and sin; the same serve most layers."""
        for one in positions:
            if id(one) not in self.positions:
                self.positions[id(one)] = self.keep(one.detach().clone())
        return tuple(self.positions[id(one)] for one in positions)

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """For attention's gradient of q, k or v: it is read at once, so one serves all layers."""
        key = name, like.shape, like.dtype
        if key not in self.buffers:
            self.buffers[key] = self.keep(
                torch.empty(like.shape, dtype=like.dtype, device=like.device)
            )
        return self.buffers[key]

    def piece(
        self,
        run: Callable[[], Sequence[Tensor]],
        inputs: Sequence[Tensor],
        parameters: tuple[Tensor, ...],
    ) -> tuple[_Piece, list[Tensor]]:
        """A piece's forward, and its outputs in a graph of autograd's."""
        replay, outputs = self.recorder.record(run)
        return _Piece(replay, self.aliases(inputs), self.aliases(outputs), parameters), [*outputs]

    def backward(
        self,
        piece: _Piece,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        d_outputs: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """A piece's backward; the gradients of its inputs."""
        piece.d_outputs = self.aliases(d_outputs)
        wanted = [x for x in (*inputs, *parameters) if x.requires_grad]
        pairs = [(y, dy) for y, dy in zip(outputs, d_outputs, strict=True) if y.requires_grad]
        if not wanted or not pairs:
            return [None] * len(inputs)

        def run() -> tuple[list[Tensor | None], list[_Flat]]:
            ys, dys = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=True))
            d_inputs = [next(found) if x.requires_grad else None for x in inputs]
            return d_inputs, _flatten([next(found) for _ in parameters])

        piece.backward, (d_inputs, flats) = self.recorder.record(run)
        piece.d_inputs = tuple(None if d is None else self.recorder.alias(d) for d in d_inputs)
        piece.flats = [_Flat(self.recorder.alias(one.tensor), one.parts) for one in flats]
        return d_inputs

    def aliases(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.recorder.alias(x.detach()) for x in tensors)


class _LayerTape:
    """One layer while it is recorded: holds what must not be overwritten until it is read."""

    def __init__(
        self,
        recording: _Recording,
        layer: "FusedDecoderLayer",
        prepared: "Prepared",
        x: Tensor,
        needs_dx: bool,
    ) -> None:
        self.recording, self.layer = recording, layer
        self.leaf = x.detach().requires_grad_(needs_dx)
        self.beside = x.detach().requires_grad_(needs_dx)
        positions = recording.copies(prepared.positions or ())
        own = prepared.at(positions).apart()
        self.of_before = own.parameters(before=True)
        self.of_behind = own.parameters(before=False)
        before, self.outputs = recording.piece(
            lambda: layer.project(ignore, self.leaf, own),
            [self.leaf],
            prepared.parameters(before=True),
        )
        q = self.outputs[0]
        self.attended = recording.keep(
            torch.empty((*q.shape[:2], q.shape[2] * q.shape[3]), dtype=q.dtype, device=q.device)
        ).requires_grad_()
        behind, (self.h3,) = recording.piece(
            lambda: (layer.behind_attention(None, self.attended, self.beside, own),),
            [self.attended, self.beside],
            prepared.parameters(before=False),
        )
        self.recorded = _Recorded(before, behind, prepared.read(), positions)

    def record_backward(self, dy: Tensor) -> Tensor:
        """From the gradient of the layer's output to that of its input."""
        recording, recorded = self.recording, self.recorded
        inputs = self.attended, self.beside
        d_attended, d_beside = recording.backward(
            recorded.behind, [self.h3], inputs, self.of_behind, [dy]
        )
        d_outputs = [
            recording.buffer(name, y) for name, y in zip("qkv", self.outputs, strict=False)
        ]
        if len(self.outputs) > 3:
            d_outputs.append(recording.keep(torch.zeros_like(dy)) if d_beside is None else d_beside)
        del d_attended  # attention has read it by the time that the next graph runs
        (dx,) = recording.backward(
            recorded.before, self.outputs, [self.leaf], self.of_before, d_outputs
        )
        # From here on their memory is for the layers before.
        del self.outputs, self.h3, self.leaf, self.beside, self.attended
        return recording.keep(torch.empty_like(dy)) if dx is None else dx


def _flatten(gradients: Sequence[Tensor | None]) -> list[_Flat]:
    flats = []
    for dtype in dict.fromkeys(g.dtype for g in gradients if g is not None):
        parts, pieces, start = [], [], 0
        for i, gradient in enumerate(gradients):
            if gradient is not None and gradient.dtype == dtype:
                parts.append((i, start, gradient.shape))
                pieces.append(gradient.reshape(-1))
                start += gradient.numel()
        flats.append(_Flat(torch.cat(pieces), parts))
    return flats


def identity(p: LoraProjection) -> tuple[Any, ...]:
    """What a graph has recorded of a projection: where its tensors lie, and its constants."""
    weight = p.weight.packed if isinstance(p.weight, Quantised4bit) else p.weight
    return (
        weight.data_ptr(),
        *((None if t is None else (t.data_ptr(), t.requires_grad)) for t in (p.A, p.B, p.bias)),
        p.scale, p.dropout, p.fp8, None if p.room is None else p.room.data_ptr(),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class GraphRecord:
    """What became of the graphs in one layer; fields as those of `apply.OperationRecord`."""

    module: str
    graphs: LayerGraphs | None = None
    reason: str = ""
    operation: str = OPERATION

    @property
    def fused(self) -> bool:
        return self.graphs is not None

    @property
    def level(self) -> str:
        return "" if self.graphs is None else "layer"

    @property
    def calls(self) -> int:
        return 0 if self.graphs is None else self.graphs.replays // len(self.graphs.layers)

    @property
    def stock_calls(self) -> dict[str, int]:
        graphs = self.graphs
        if graphs is None:
            return {}
        return {why: n // len(graphs.layers) for why, n in graphs.reasons.items()}
