"""Passes: kernels and NumPy agree bit for bit, and nothing beside a buffer is read or written.

Every array that a kernel is given lies between guards. Those beside numbers are NaN, so that what
is read there shows in the result; what is written there shows in the guards, which differ.
"""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.schemes.kernels import passes
from enclave_runtime.schemes.kernels.hadamard import AxisMap, draw, mix, unmix
from enclave_runtime.schemes.kernels.passes import Pass, Scratch
from tests.support.reference_pass import reference

KEY = bytes(range(32))
GUARD = 320  # elements; more than a row of four strips
DTYPES = ["float32", "float64"]
# Below, at and above a block's 64 positions, powers of two and not; likewise for lanes.
SIZES = [1, 2, 3, 5, 8, 31, 63, 64, 65, 100, 127, 128, 129, 200]
WIDTHS = [1, 2, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 130]


class Fences:
    """Arrays between guards, and the check that these are as they were."""

    def __init__(self, shift: int):
        """Of arrays that start `shift` elements off from where NumPy puts them."""
        self._shift = shift
        self._fences: list[tuple[str, np.ndarray, np.ndarray, slice]] = []

    def around(self, name: str, content: np.ndarray, *, written: bool = False) -> np.ndarray:
        """A copy of an array between guards; what is not to be written is guarded as well."""
        start = GUARD + self._shift
        memory = np.zeros(start + content.size + GUARD, content.dtype)
        if content.dtype.kind == "f":
            # A NaN of this fence's own, which a NaN that was computed from others is not.
            memory.fill(np.nan)
            memory.view(f"u{content.itemsize}")[...] |= 1 + len(self._fences)
        inside = memory[start : start + content.size]
        inside[:] = content.reshape(-1)
        free = slice(start, start + content.size if written else start)
        self._fences.append((name, memory, memory.copy(), free))
        return inside.reshape(content.shape)

    def assert_whole(self) -> None:
        """No byte has changed that was guarded."""
        for name, memory, before, free in self._fences:
            for part in (slice(free.start), slice(free.stop, None)):
                assert memory[part].tobytes() == before[part].tobytes(), name


def uniform(seed: int, *shape: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def drawn(size: int, copies: int = 1, rounds: int = 2) -> AxisMap:
    return draw(KeyStream(KEY), size, condition=4, copies=copies, rounds=rounds)


def fenced(plan: Pass, fences: Fences, in_place: bool = False) -> Pass:
    """The same pass with every array between guards."""
    read = ("extra", "order", "scale", "level", "same")
    arrays = {name: fences.around(name, getattr(plan, name)) for name in read}
    arrays["source"] = fences.around("source", plan.source, written=in_place)
    hole = np.full_like(plan.target, np.nan)
    target = arrays["source"] if in_place else fences.around("target", hole, written=True)
    arrays["source"] = arrays["source"].view()
    for name in ("source", "extra"):
        arrays[name].flags.writeable = False
    return plan._replace(**arrays, target=target)


def fenced_scratch(plan: Pass, fences: Fences) -> Scratch:
    """Scratch of NaNs between guards."""
    scratch = passes.scratch_for(plan)._asdict()
    holes = {name: np.full_like(array, np.nan) for name, array in scratch.items()}
    return Scratch(**{name: fences.around(name, a, written=True) for name, a in holes.items()})


def assert_computed(plan: Pass, *, shift: int = 0, in_place: bool = False) -> None:
    """The kernel does what NumPy does, between guards."""
    expected = reference(plan)
    kernel = passes.mix_rows if plan.along_rows else passes.mix_strips
    fences = Fences(shift)
    guarded = fenced(plan, fences, in_place)
    kernel(guarded, fenced_scratch(plan, fences), 0, plan.tasks)
    fences.assert_whole()
    assert guarded.target.tobytes() == expected.tobytes()


def planned(
    outer: int,
    size: int,
    inner: int,
    dtype: str,
    *,
    more: int = 0,
    dropped: int = 0,
    copies: int = 1,
    rounds: int = 2,
    tail_first: bool = False,
) -> Pass:
    """A pass over the middle axis of (outer, size, inner)."""
    source = uniform(1, outer, size - more, inner, dtype=dtype)
    extra = uniform(2, outer, more, inner, dtype=dtype) if more else None
    target = np.empty((outer, size - dropped, inner), dtype)
    axis_map = drawn(size, copies, rounds)._replace(tail_first=tail_first)
    return passes.planned(source, 1, axis_map, extra, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail_first", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_and_numpy_agree_between_guards(size, tail_first, dtype):
    for outer, inner in [(1, 17), (3, 1), (2, 64), (19, 1), (2, 7)]:
        plan = planned(outer, size, inner, dtype, tail_first=tail_first)
        assert plan.along_rows == (inner == 1)
        assert_computed(plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 31, 40])
@pytest.mark.parametrize("copies", [1, 3])
def test_rows_are_grouped_within_their_copy(copies, rows, dtype):
    for size in (5, 16, 70):
        plan = planned(copies * rows, size, 1, dtype, copies=copies)
        assert plan.along_rows
        assert_computed(plan)


@settings(max_examples=150)
@given(
    outer=st.integers(1, 5),
    size=st.sampled_from(SIZES),
    inner=st.sampled_from(WIDTHS),
    changed=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    copied=st.booleans(),
    rounds=st.integers(1, 3),
    tail_first=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    shift=st.integers(0, 5),
    in_place=st.booleans(),
)
def test_any_pass_keeps_to_its_buffers(outer, size, inner, changed, shift, in_place, **options):
    more, dropped = (0, 0) if in_place else (min(part, size - 1) for part in changed)
    copies = outer if options.pop("copied") else 1
    plan = planned(outer, size, inner, more=more, dropped=dropped, copies=copies, **options)
    assert_computed(plan, shift=shift, in_place=in_place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outer", "size", "inner"), [(3, 65, 130), (70, 9, 1), (2, 5, 7)])
def test_every_element_is_written_by_one_task(outer, size, inner, dtype):
    plan = planned(outer, size, inner, dtype)
    expected, written = reference(plan), np.zeros(plan.target.size, int)
    for task in range(plan.tasks):
        fences = Fences(0)
        own = fenced(plan, fences)
        kernel = passes.mix_rows if plan.along_rows else passes.mix_strips
        kernel(own, fenced_scratch(plan, fences), task, task + 1)
        fences.assert_whole()
        here = ~np.isnan(own.target)
        assert own.target[here].tobytes() == expected.reshape(-1)[here].tobytes()
        written += here
    assert (written == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [(2, 1), (1, 3), (-1, 1), (3, -2)])
def test_strided_arrays_are_read_where_they_lie(step, dtype):
    rows, columns = 37, 66
    fences = Fences(1)
    room = rows * abs(step[0]), columns * abs(step[1])
    memory = fences.around("source", uniform(3, *room, dtype=dtype))
    x = memory[:: step[0], :: step[1]]
    assert x.shape == (rows, columns) and not x.flags.c_contiguous
    more = fences.around("extra", uniform(4, 10, columns, dtype=dtype))[::2]
    out = fences.around("out", np.full((rows + 5, columns), np.nan, dtype), written=True)
    maps = {0: drawn(rows + 5), 1: drawn(columns)}
    mix(x, maps, extra=more, out=out)
    fences.assert_whole()
    whole = np.concatenate([x, more])
    assert out.tobytes() == mix(whole, maps).tobytes()
    back = fences.around("back", np.full((rows, columns), np.nan, dtype), written=True)
    turned = fences.around("turned", out.T.copy()).T
    inverses = {axis: axis_map.inverse() for axis, axis_map in maps.items()}
    unmix(turned, inverses, keep=rows, out=back)
    fences.assert_whole()
    np.testing.assert_allclose(back, x, rtol=0, atol=2e-4 if dtype == "float32" else 1e-12)


def test_guards_notice_what_passes_them():
    """A pass whose numbers do not fit its arrays: guards or result tell."""
    plan = planned(2, 20, 7, "float32")
    fences = Fences(0)
    wide = fenced(plan, fences)._replace(inner=8)
    passes.mix_strips(wide, fenced_scratch(plan, fences), 0, plan.tasks)
    with pytest.raises(AssertionError, match="target"):
        fences.assert_whole()
    assert np.isnan(wide.target).any()
    fences = Fences(0)
    long = fenced(plan, fences)._replace(rows=21)
    passes.mix_strips(long, fenced_scratch(plan, fences), 0, plan.tasks)
    with pytest.raises(AssertionError, match="tiles"):
        fences.assert_whole()


def test_scratch_starts_on_cache_lines_and_is_as_long_as_needed():
    plan = planned(1, 70, 130, "float64")
    for array in passes.scratch_for(plan):
        assert array.ctypes.data % 64 == 0 and array.dtype == np.float64
    lengths = [array.size // 8 for array in passes.scratch_for(plan)]
    assert lengths == [70, 70, 64, 4 * 70]
    assert math.prod(plan.target.shape) == plan.elements
