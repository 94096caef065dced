"""What a layer's tensors weigh and compute, beside what `plugin/test_planner*.py` holds it to."""

from lorafuse.patches.layer_sizes import LayerSizes


def test_a_window_makes_less_work() -> None:
    full = LayerSizes(4096, 6144, 4096, 28672)
    sliding = LayerSizes(4096, 6144, 4096, 28672, window=512)
    assert sliding.forward_flops(16384, 16384) < full.forward_flops(16384, 16384)
    assert sliding.forward_flops(256, 256) == full.forward_flops(256, 256)
