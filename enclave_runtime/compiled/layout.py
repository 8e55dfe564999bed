"""What the kernels and their callers agree on: how a pass is cut. Needs no Numba."""

TILE_BYTES = 64  # of a row of a tile: one cache line
STRIPS = 4  # side by side, copied together: far rows cost less in runs of 256 bytes
