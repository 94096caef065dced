"""The modes of keeping what backward needs, by name.

off        all that backward needs; nothing is computed twice
selective  the layer's input, the attention's output and its log-sum-exp; norms, q/k/v, the
           second residual and gate/up are computed again, attention and down never
offload    as selective, but what is kept waits on the host, and where that is too small some
           layers compute attention again, too; a frozen table of embeddings that
           is no head as well lies there too, and is read from there
auto       for each layer the fastest of these that the GPU's free memory has room for
"""

__all__ = ["AUTO", "MODES", "OFF", "OFFLOAD", "SELECTIVE", "TILE_ROWS"]

OFF, SELECTIVE, OFFLOAD, AUTO = "off", "selective", "offload", "auto"
MODES = (OFF, SELECTIVE, OFFLOAD)  # from fast to small
# Tokens that the MLP takes at a time: gate/up and their like exist for so many only.
TILE_ROWS = {SELECTIVE: 8192, OFFLOAD: 8192}
