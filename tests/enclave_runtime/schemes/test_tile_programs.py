"""Tile programs: each step against NumPy, at sizes that fill tiles and at sizes that do not."""

import numpy as np
import pytest

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.schemes.kernels.tile_programs import (
    TiledMatrix,
    TileProgram,
    empty_tiles,
    padded,
)

SHAPES = [(1, 1), (16, 16), (5, 40), (70, 33), (130, 64)]
DTYPES = [np.float32, np.float64]


def matrices(shape: tuple[int, int], dtype: type, copies: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(copies, *shape)).astype(dtype)


def dense(strips: TiledMatrix) -> np.ndarray:
    copies, tiles, rows, lanes = strips.tiles.shape
    whole = strips.tiles.transpose(0, 2, 1, 3).reshape(copies, rows, tiles * lanes)
    return whole[..., : strips.columns]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_loaded_added_and_stored(shape, dtype, axis, transposed):
    x = matrices(shape, dtype)
    x = x.swapaxes(-1, -2) if transposed else x
    out, strips = np.empty(x.shape, x.dtype), empty_tiles(2, x.shape[1], x.shape[2], x.dtype)
    program = TileProgram(x.dtype, 2, x.shape[-3 - axis])
    program.load(0, x, axis)
    program.add(0, x, axis)
    program.store(0, out, axis)
    program.store(0, strips, axis)
    program.run()
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(dense(strips), 2 * x)
    again = np.empty_like(out)
    program = TileProgram(x.dtype, 2, x.shape[-3 - axis])
    program.load(1, strips, axis)
    program.store(1, again, axis)
    program.run()
    np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("rounds", [1, 3])
def test_maps_of_either_axis(shape, copies, rounds):
    x = matrices(shape, np.float64)
    for axis in (-2, -1):
        a = hadamard.draw(
            KeyStream(bytes(32)), x.shape[axis], condition=4, copies=copies, rounds=rounds
        )
        for one in (a, a.inverse()):
            out = np.empty_like(x)
            program = TileProgram(x.dtype, 2, x.shape[-3 - axis])
            program.load(0, x, axis)
            program.map(0, one)
            program.store(0, out, axis)
            program.run()
            for i, matrix in enumerate(x):
                key = one.dense(i if copies > 1 else 0)
                exact = key @ matrix if axis == -2 else matrix @ key.T
                np.testing.assert_allclose(out[i], exact, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_whose_inner_axis_is_short(shape, dtype):
    x, rng = matrices(shape, dtype), np.random.default_rng(1)
    left = rng.normal(size=(2, shape[0], 11)).astype(dtype)
    right = rng.normal(size=(2, shape[1], 11)).astype(dtype)
    out, met = np.empty_like(x), np.full((2, shape[1], 16), np.nan, dtype)
    program = TileProgram(x.dtype, 2, shape[1])
    program.load(0, x, -2)
    program.inner(0, padded(left), shape[0], 1)
    program.write(1, met)
    program.read(0, padded(right))
    program.outer(0, padded(left), 0)
    program.store(0, out, -2)
    program.run()
    near = 1e-4 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(met[..., :11], x.swapaxes(-1, -2) @ left, atol=near)
    assert not met[..., 11:].any()
    np.testing.assert_allclose(out, x + left @ right.swapaxes(-1, -2), atol=near)


@pytest.mark.parametrize(("size", "to"), [(40, 23), (23, 40)])
def test_identity_resized_and_subtracted(size, to):
    x = matrices((to, size), np.float64, 1)
    out = np.empty_like(x)
    program = TileProgram(x.dtype, 1, size)
    program.load(0, x, -2)
    program.unit(1, size)
    program.resize(1, size, to)
    program.subtract(0, 1, to)
    program.store(0, out, -2)
    program.run()
    np.testing.assert_array_equal(out[0], x[0] - np.eye(to, size))


def test_programs_show_nothing_when_printed():
    assert repr(TileProgram(np.dtype(np.float32), 1, 1)) == "TileProgram(<secret>)"
    assert repr(empty_tiles(1, 1, 1, np.dtype(np.float32))) == "TiledMatrix(<secret>)"
