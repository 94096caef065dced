"""The fused gated MLP of a module instance."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorafuse.kernels.lora_linear import NormPrologue
from lorafuse.kernels.lora_mlp import lora_mlp
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.bind import FusedForward, Unsupported
from lorafuse.patches.structure import GatedMlp, drops_out
from lorafuse.patches.weights import WeightFormat


class MlpReader:
    """A gated MLP's projections as they are now, and the kernel call on them."""

    def __init__(self, mlp: GatedMlp, formats: Sequence[WeightFormat]) -> None:
        self.module = mlp.module
        self.gate_up = tuple(LinearReader(linear, formats) for linear in mlp.gate_up)
        self.down = LinearReader(mlp.down, formats)
        self.activation = mlp.activation

    def linear_groups(self) -> list[Sequence[Any]]:
        """(gate and up), (down)."""
        return [self.gate_up, (self.down,)]

    def prepare(self, x: Tensor) -> tuple[Any, Any]:
        """(gate and up, down) as kernel projections; raises Unsupported."""
        if drops_out(self.module):
            raise Unsupported("the MLP has a dropout of its own")
        return [reader.projection(x) for reader in self.gate_up], self.down.projection(x)

    def __call__(
        self,
        x: Tensor,
        prepared: tuple[Any, Any],
        norm: NormPrologue | None,
        residual: bool,
        keep_gate_up: bool = True,
        tile_rows: int = 0,
    ) -> Tensor:
        gate_up, down = prepared
        return lora_mlp(x, gate_up, down, self.activation, norm, residual, keep_gate_up, tile_rows)


class FusedMlp(FusedForward):
    """MLP part: gate and up in one GEMM, activation in one kernel, LoRA folded in."""

    operations = ("lora_mlp",)

    def __init__(self, mlp: GatedMlp, formats: Sequence[WeightFormat]) -> None:
        super().__init__(mlp.module)
        self.reader = MlpReader(mlp, formats)

    def linear_groups(self) -> list[Sequence[Any]]:
        return self.reader.linear_groups()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return self.fall_back("it was called with more than one tensor", *args, **kwargs)
        x = args[0]
        try:
            if x.numel() == 0:
                raise Unsupported("its input is empty")
            prepared = self.reader.prepare(x)
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, x)
        self.calls += 1
        return self.reader(x, prepared, None, False)
