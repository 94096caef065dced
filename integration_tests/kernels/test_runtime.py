"""Launching a compiled kernel again: the same numbers, never another specialisation's kernel."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lorafuse.kernels import rms_norm as module
from lorafuse.kernels import runtime
from lorafuse.kernels.runtime import CachedLaunch


class Recorder:
    """Stands where `triton.jit`'s object stands, and for what it compiles."""

    arg_names = ("x", "n", "scale", "BLOCK")

    def __init__(self) -> None:
        self.launches: list[tuple[str, Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.launches.append(("triton", grid, args))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.recorder.launches.append(("cached", grid, args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> tuple[CachedLaunch, Recorder]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    recorder = Recorder()
    return CachedLaunch(recorder), recorder


def test_what_triton_specialises_on_is_launched_anew(kernel) -> None:
    launch, recorder = kernel
    x = torch.zeros(64)

    def run(*args: Any, BLOCK: int = 64) -> str:
        launch[(3,)](*args, BLOCK=BLOCK, num_warps=4)
        return recorder.launches[-1][0]

    assert run(x, 16, 0.5) == "triton"
    assert run(x, 16, 0.25) == "cached", "a float is an argument like any other"
    assert recorder.launches[-1][1:] == ((3, 1, 1), (x, 16, 0.25, 64))
    for other in ((x, 1, 0.5), (x, 17, 0.5), (x[1:], 16, 0.5), (x.half(), 16, 0.5)):
        assert run(*other) == "triton" and run(*other) == "cached", other
    assert run(x, 16, 0.5, BLOCK=32) == "triton"
    assert run(x, 16, 0.5) == "cached"
    assert run(x, 16, 2) == "triton", "an integer where a float was is another signature"


def test_a_tensor_behind_a_number_is_refused(kernel) -> None:
    launch, _ = kernel
    with pytest.raises(TypeError, match="first arguments"):
        launch[(1,)](torch.zeros(4), 4, torch.zeros(4), BLOCK=4)


def test_batches_of_ever_new_lengths_do_not_pile_up(kernel) -> None:
    launch, _ = kernel
    for n in range(2 * runtime._MOST_KEYS):
        launch[(1,)](torch.zeros(4), n, 0.5, BLOCK=4)
    assert len(launch.compiled) <= runtime._MOST_KEYS


def test_the_gpu_of_the_data_is_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    class On:
        def __init__(self, index: int) -> None:
            self.is_cuda, self.device = index >= 0, index

        def get_device(self) -> int:
            return self.device

    entered: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or nullcontext())
    for index in (1, -1, 0, 2):
        with runtime.launch_device(On(index)):  # type: ignore[arg-type]
            pass
    assert entered == [0, 2]


@pytest.mark.gpu
def test_a_kernel_launched_again_on_a_gpu(cuda) -> None:
    """Other data, lengths, alignments and dtypes in turn, each twice and more."""
    wide = torch.randn(70, 600, device=cuda)
    weight = torch.randn(256, device=cuda)
    for _ in range(3):
        for rows, first, dtype in ((64, 0, None), (1, 0, None), (33, 1, None), (64, 0, "half")):
            x = wide[:rows, first : first + 256]
            x = x.half() if dtype else x
            out = torch.empty_like(x)
            module.rms_norm_fwd(x, weight, 1e-5, 0.0, out)
            exact = module.reference(x, weight, 1e-5)
            torch.testing.assert_close(out, exact)
        wide = torch.randn_like(wide)
    assert isinstance(module._rms_norm_fwd_kernel, CachedLaunch)
    assert len(module._rms_norm_fwd_kernel.compiled) >= 4
