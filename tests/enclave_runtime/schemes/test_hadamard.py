"""Mixing of axes: the kernels do what `AxisMap.dense` says, for every shape and size."""

import math
import os
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.schemes.kernels import hadamard, passes, threads
from enclave_runtime.schemes.kernels.hadamard import AxisMap, draw, mix, unmix

KEY = bytes(range(32))
SIZES = [1, 2, 3, 5, 63, 64, 65, 100, 128, 192, 200]
# Sums of at most a few hundred terms, each of a relative error of 2**-24 or 2**-53.
TOLERANCES = {"float32": 2e-5, "float64": 1e-13}


def uniform(seed: int, *shape: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def drawn(size: int, *, condition: float = 4, copies: int = 1, key: bytes = KEY) -> AxisMap:
    return draw(KeyStream(key), size, condition=condition, copies=copies)


def densely(x: np.ndarray, maps: dict[int, AxisMap]) -> np.ndarray:
    """Applies the maps' matrices: what `mix` must agree with."""
    x = x.astype(np.float64)
    for axis, axis_map in maps.items():
        if axis_map.copies == 1:
            x = np.moveaxis(np.tensordot(axis_map.dense(), x, (1, axis)), 0, axis)
        else:
            parts = [{axis - 1: single(axis_map, i)} for i in range(len(x))]
            x = np.stack([densely(part, own) for part, own in zip(x, parts, strict=True)])
    return x


def single(axis_map: AxisMap, copy: int) -> AxisMap:
    """One copy of several."""
    part = slice(copy, copy + 1)
    return AxisMap(axis_map.order[part], axis_map.scale[part], axis_map.tail_first)


def assert_mixed(got: np.ndarray, x: np.ndarray, maps: dict[int, AxisMap]) -> None:
    assert got.dtype == x.dtype and got.flags.c_contiguous
    np.testing.assert_allclose(got, densely(x, maps), rtol=0, atol=TOLERANCES[x.dtype.name])


# The kernels, against matrices


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tail_first", [False, True])
def test_mixing_is_multiplication_by_the_dense_matrix(size, dtype, tail_first):
    axis_map = drawn(size)._replace(tail_first=tail_first)
    shapes = [(size,), (size, 3), (size, 70), (35, size), (1, size), (3, size, 16)]
    shapes += [(2, 17, size), (size, 2, 3), (2, 1, size, 5), (size, 1, 1, 2)]
    for shape in shapes:
        x = uniform(1, *shape, dtype=dtype)
        before = x.copy()
        axis = shape.index(size)
        assert_mixed(mix(x, {axis: axis_map}), x, {axis: axis_map})
        np.testing.assert_array_equal(x, before)


@st.composite
def mixings(draw_from):
    """An array's shape, the axes that are mapped, and how many copies each map has."""
    shape = draw_from(
        st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 33, 70]), min_size=1, max_size=4)
    )
    axes = draw_from(st.lists(st.sampled_from(range(len(shape))), unique=True))
    maps = {}
    for axis in axes:
        copies = draw_from(st.sampled_from([1, shape[0]])) if 0 not in axes and shape[0] else 1
        key = draw_from(st.binary(min_size=32, max_size=32))
        if shape[axis]:
            maps[axis] = drawn(shape[axis], copies=copies, key=key)
    return tuple(shape), maps


@settings(max_examples=60)
@given(mixing=mixings(), dtype=st.sampled_from(list(TOLERANCES)), shared=st.booleans())
def test_any_axes_of_any_rank_are_mixed(mixing, dtype, shared):
    shape, maps = mixing
    x = uniform(2, *shape, dtype=dtype)
    out = np.full_like(x, np.nan) if shared else None
    got = mix(x, maps, out=out)
    assert out is None or got is out
    assert_mixed(got, x, maps)
    back = unmix(got, {axis: axis_map.inverse() for axis, axis_map in maps.items()})
    np.testing.assert_allclose(back, x, rtol=0, atol=10 * TOLERANCES[dtype])


@settings(max_examples=60)
@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.integers(0, 70),
    more=st.integers(0, 9),
    width=st.sampled_from([1, 2, 16, 33, 130]),
    copied=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_extra_rows_are_appended_and_cut_off(batch, rows, more, width, copied, dtype):
    size = rows + more
    if not size:
        return
    x = uniform(3, *batch, rows, width, dtype=dtype)
    extra = uniform(4, *batch, more, width, dtype=dtype)
    copies = batch[0] if batch and copied else 1
    maps = {x.ndim - 2: drawn(size, copies=copies), x.ndim - 1: drawn(width, copies=copies)}
    whole = np.concatenate([x, extra], -2)
    got = mix(x, maps, extra=extra)
    assert_mixed(got, whole, maps)
    np.testing.assert_array_equal(got, mix(whole, maps))
    undo = {axis: axis_map.inverse() for axis, axis_map in maps.items()}
    back = unmix(got, undo, keep=rows)
    np.testing.assert_array_equal(back, unmix(got, undo)[..., :rows, :])
    np.testing.assert_allclose(back, x, rtol=0, atol=10 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_threads_do_the_same_work(dtype, monkeypatch):
    x, maps = uniform(5, 300, 400, dtype=dtype), {0: drawn(311), 1: drawn(400)}
    extra = uniform(6, 11, 400, dtype=dtype)
    monkeypatch.setattr(threads, "PARALLEL_ELEMENTS", 0)
    monkeypatch.setattr(threads, "THREADS", 3)
    parallel = mix(x, maps, extra=extra)
    monkeypatch.setattr(threads, "THREADS", 1)
    np.testing.assert_array_equal(parallel, mix(x, maps, extra=extra))
    assert_mixed(parallel, np.concatenate([x, extra]), maps)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
def test_round_trip_error_is_rounding(dtype, bound):
    x, maps = uniform(7, 500, 333, dtype=dtype), {0: drawn(500), 1: drawn(333)}
    back = unmix(mix(x, maps), {axis: axis_map.inverse() for axis, axis_map in maps.items()})
    assert np.linalg.norm(back - x) <= bound * np.linalg.norm(x)


def test_products_are_kept_by_partners():
    x, w = uniform(8, 20, 130), uniform(9, 130, 40)
    inner = drawn(130)
    mixed = mix(x, {1: inner}) @ mix(w, {0: inner.inverse_transpose()})
    np.testing.assert_allclose(mixed, x @ w, rtol=0, atol=1e-12)


def test_out_may_lie_anywhere_and_sources_may_be_read_only():
    memory = np.zeros(40 * 30 + 3)
    out = memory[3:].reshape(40, 30)
    x, maps = uniform(10, 40, 30), {0: drawn(40), 1: drawn(30)}
    x.flags.writeable = False
    assert mix(x, maps, out=out) is out
    assert_mixed(out, x, maps)
    assert not memory[:3].any()
    transposed = uniform(11, 30, 40).T
    assert_mixed(mix(transposed, maps), transposed, maps)
    shifted = np.frombuffer(bytes(3) + x.tobytes(), np.uint8)[3:].view(np.float64).reshape(x.shape)
    np.testing.assert_array_equal(mix(shifted, maps), out)


def test_out_shows_finished_elements_only(monkeypatch):
    """An array that lacks some axis's map would help whoever watches shared memory."""
    out = np.zeros((20, 30))
    seen, apply = [], hadamard._apply

    def watched(*arguments):
        seen.append(out.copy())
        apply(*arguments)

    monkeypatch.setattr(hadamard, "_apply", watched)
    mix(uniform(12, 20, 30), {0: drawn(20), 1: drawn(30)}, out=out)
    assert len(seen) == 2 and not np.any(seen) and out.all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(70, 40), (3, 70, 40), (70,)])
def test_values_that_are_not_finite_spread_over_their_axis(value, shape):
    x = uniform(13, *shape)
    x[..., 5] = value
    with np.errstate(all="raise"):
        got = mix(x, {x.ndim - 1: drawn(shape[-1])})
    # One block's output is not finite after the first round; the second spreads it on.
    assert not np.isfinite(got).all(axis=-1).any()


def test_subnormal_numbers_are_not_flushed():
    x = np.full(64, 2.0**-1060)
    assert np.abs(mix(x, {0: drawn(64)})).max() > 0


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 5), (0, 5, 5)])
def test_empty_arrays_stay_empty(shape):
    maps = {axis: drawn(size) for axis, size in enumerate(shape) if size}
    assert mix(np.zeros(shape), maps).shape == shape


def test_what_does_not_fit_is_refused():
    x, axis_map = np.zeros((3, 4, 5)), drawn(4)
    for arguments, options, text in [
        ((x.astype(np.float16), {}), {}, "expected float32 or float64"),
        ((np.zeros(()), {}), {}, "rank 1 or more"),
        ((x, {2: axis_map}), {}, "a map of size 4 on axis 2"),
        ((x, {-2: axis_map}), {}, "on axis -2"),
        ((x, {1: drawn(4, copies=2)}), {}, "2 copies on axis 1"),
        ((x[0], {0: drawn(4, copies=4)}), {}, "4 copies on axis 0"),
        ((x, {0: drawn(3), 1: drawn(4, copies=3)}), {}, "a map of axis 0 beside copies"),
        ((x, {2: drawn(5)}), {"extra": x}, "extra rows need a map"),
        ((x, {1: axis_map}), {"extra": x}, "a map of size 4 on axis 1"),
        ((x, {1: axis_map}), {"extra": x[:, :, 1:]}, "do not fit"),
        ((x, {1: axis_map}), {"extra": x.astype(np.float32)}, "do not fit"),
        ((x, {1: axis_map}), {"out": np.zeros((3, 5, 4))}, "out is not"),
        ((x, {1: axis_map}), {"out": np.zeros((5, 4, 3)).T}, "out is not"),
    ]:
        with pytest.raises(ValueError, match=text):
            mix(*arguments, **options)
    with pytest.raises(ValueError, match="cannot keep 5 of 4 rows"):
        unmix(x, {1: axis_map}, keep=5)
    for size, condition in [(0, 1), (3, 0.5), (3, math.inf), (3, math.nan)]:
        with pytest.raises(ValueError, match="draw: "):
            drawn(size, condition=condition)


# The group elements


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("condition", [1, 4])
def test_inverses_and_transposes(size, condition):
    for axis_map in (drawn(size, condition=condition, copies=2), drawn(size).inverse()):
        for copy in range(axis_map.copies):
            matrix, identity = axis_map.dense(copy), np.eye(size)
            np.testing.assert_allclose(
                axis_map.inverse().dense(copy) @ matrix, identity, rtol=0, atol=1e-13
            )
            np.testing.assert_allclose(
                axis_map.transpose().dense(copy), matrix.T, rtol=0, atol=1e-13
            )
            np.testing.assert_allclose(
                axis_map.inverse_transpose().dense(copy),
                axis_map.transpose().inverse().dense(copy),
                rtol=0,
                atol=1e-13,
            )
            np.testing.assert_allclose(axis_map.scaled(-3).dense(copy), -3 * matrix)


@pytest.mark.parametrize("size", SIZES)
def test_condition_is_bounded(size):
    np.testing.assert_allclose(np.linalg.cond(drawn(size, condition=1).dense()), 1, rtol=1e-12)
    assert np.linalg.cond(drawn(size, condition=4).dense()) <= 4 * (1 + 1e-12)
    if size > 60:  # The bound is nearly met where there are many scales.
        assert np.linalg.cond(drawn(size, condition=4).dense()) > 3


@given(size=st.integers(1, 300), condition=st.sampled_from([1, 4, 100]), copies=st.integers(1, 3))
def test_drawn_maps_are_what_they_should_be(size, condition, copies):
    axis_map = drawn(size, condition=condition, copies=copies)
    assert (axis_map.size, axis_map.copies, axis_map.tail_first) == (size, copies, False)
    assert axis_map.order.dtype == np.int32 and axis_map.scale.dtype == np.float64
    everything = np.broadcast_to(np.arange(size), (copies, 3, size))
    np.testing.assert_array_equal(np.sort(axis_map.order, axis=2), everything)
    magnitude = np.abs(axis_map.scale)
    assert (magnitude[:, ::2] == 1).all()
    root = math.sqrt(condition) * (1 + 1e-12)
    assert (magnitude[:, 1] <= root).all() and (magnitude[:, 1] >= 1 / root).all()


def test_scales_are_log_uniform_and_signs_fair():
    scale = drawn(20_000, condition=4).scale[0]
    logarithms = np.log(np.abs(scale[1])) / math.log(4) + 0.5
    assert stats.kstest(logarithms, "uniform").pvalue > 1e-6
    assert stats.kstest(logarithms**1.1, "uniform").pvalue < 1e-6
    for signs in scale < 0:
        assert stats.binomtest(int(signs.sum()), signs.size).pvalue > 1e-6


def test_an_element_reaches_its_whole_axis():
    """Two rounds mix each entry into nearly all others of up to 64 blocks."""
    matrix = drawn(512).dense()
    assert (np.abs(matrix) > 1e-12).mean() > 0.9
    # With one round, an entry reaches 64 places at most: the bound sees the difference.
    assert 64 / 512 < 0.9


def test_randomness_comes_from_the_stream_alone():
    first, again, other = drawn(50), drawn(50), drawn(50, key=bytes(32))
    np.testing.assert_array_equal(first.order, again.order)
    np.testing.assert_array_equal(first.scale, again.scale)
    assert not np.array_equal(first.order, other.order)
    # One stream never gives the same map twice, and copies differ.
    stream = KeyStream(KEY)
    orders = np.concatenate(
        [draw(stream, 50, condition=1, copies=2).order.reshape(-1, 50) for _ in range(2)]
    )
    assert len(np.unique(orders, axis=0)) == len(orders) == 12


def test_representations_show_nothing():
    axis_map = drawn(3)
    assert repr(axis_map) == str(axis_map) == f"{axis_map}" == "AxisMap(<secret>)"
    x = uniform(14, 3)
    assert repr(passes.planned(x, 0, axis_map, None, x)) == "Pass(<secret>)"


# Compilation


def test_works_where_numba_can_write_no_cache(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    program = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = [caching.UserProvidedCacheLocator]\n"
        "from enclave_runtime.crypto.keys import KeyStream, _shuffled\n"
        "assert type(_shuffled.dispatcher._cache).__name__ == 'NullCache'\n"
        "import enclave_runtime.schemes.kernels.hadamard\n"
        "print(sorted(KeyStream(bytes(32)).permutation(3)))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(blocked / "below")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "0" in done.stdout


def test_every_kernel_is_compiled_by_warm_up():
    hadamard.warm_up()
    kernels = (passes.mix_rows.dispatcher, passes.mix_strips.dispatcher)
    before = [len(kernel.signatures) for kernel in kernels]
    for dtype in TOLERANCES:
        x = uniform(14, 2, 70, 40, dtype=dtype)
        x.flags.writeable = False
        mix(x, {1: drawn(70, copies=2), 2: drawn(40)})
        unmix(x, {1: drawn(70)}, keep=3)
        mix(x, {1: drawn(71)}, extra=uniform(15, 2, 1, 40, dtype=dtype))
    assert [len(kernel.signatures) for kernel in kernels] == before == [2, 2]
