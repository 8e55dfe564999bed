"""What the kernels and their callers agree on: how a pass is cut. Needs no Numba."""

import enum

TILE_BYTES = 64  # of a row of a tile: one cache line
STRIPS = 4  # side by side, copied together: far rows cost less in runs of 256 bytes
STAGED = 8  # strips that a tile program takes from far rows, or brings there, at a time
WORDS = 13  # of a step of a tile program
FACTORS = 256  # rows of a tile's width that a program may keep of the factors of a product


class TileStep(enum.IntEnum):
    """What a step of a tile program does; see `enclave_runtime.schemes.kernels.tile_programs`."""

    LOAD = 0
    ADD = 1
    STORE = 2
    UNIT = 3
    ZERO = 4
    MAP = 5
    SUBTRACT = 6
    OUTER = 7
    INNER = 8
    READ = 9
    WRITE = 10
