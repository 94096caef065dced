"""What `gpu/copy_overlap.py` makes of a trace."""

import importlib

import pytest


@pytest.fixture
def script():
    return importlib.import_module("copy_overlap")


def event(category, name, begin, end):
    return {"cat": category, "name": name, "ts": begin, "dur": end - begin}


TRACE = {
    "traceEvents": [
        event("kernel", "gemm", 0, 1000),
        event("kernel", "norm", 900, 2000),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 500, 1500),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1500, 3000),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 9000),
        event("kernel", "adam", 4000, 5000),
        {"ph": "M", "name": "process_name"},
    ]
}


def test_a_trace_is_drawn(script, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    script.plot(TRACE, tmp_path / "copies.png")
    assert (tmp_path / "copies.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_added_up(script) -> None:
    assert script.overlap(TRACE) == pytest.approx(
        {
            "step_ms": 5.0, "kernels_ms": 3.0, "to_host_ms": 1.0, "from_host_ms": 1.5,
            "copies_ms": 2.5, "copies_alone_ms": 1.0, "idle_ms": 1.0, "hidden": 0.6,
        }
    )  # fmt: skip
