"""Finds plaintext in bytes: copies at any byte offset, permuted copies, scaled copies, keys.

For tests that record what an enclave shows. A `Search` is made from the values that must not be
seen and asked about bytes; it reads these as each float format, little-endian, from each offset:

- *run*: eight values of the plaintext that follow each other along any axis (or flat), times one
  number that may be 1. A scale for each row or column leaves the runs along it. They may lie a
  stride apart, as a column does in a matrix.
- *permuted*: the values of a row, of a column or of a whole tensor, in any order, with any signs
  and times one number.
- *element*: a single value's 8 bytes of float64, or two neighbours' of float32.
- *integers*: 64 values that are all integers, such as labels or their one-hot form, in any format.
- *text*: a decimal number that is a value of the plaintext.
- *secret*: a key's bytes, also in hexadecimal and base64, and each half of it.

Constants that anybody knows do not count: zeros, values with few significant bits (ones, small
integers, halves of them), runs that are counts or multiples of one number, and tensors of fewer
than eight values but for their float64. Public scalars (a learning rate, Adam's bias
corrections) are the caller's to leave out. What is neither a copy nor one of these forms, such
as a sum with something else, is not found: that is the attack suite's work.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

RUN = 8  # values of a run
INTEGERS = 64  # values of a run of integers
# Name, type, unit roundoff, and the largest step of the binary exponent between neighbours: where
# it is larger, the bytes are not of this format, or random. Every step of float16 is small.
FORMATS = (
    ("float64", np.dtype("<f8"), 2.0**-53, 40),
    ("float32", np.dtype("<f4"), 2.0**-24, 24),
    ("bfloat16", np.dtype(ml_dtypes.bfloat16), 2.0**-8, 24),
    ("float16", np.dtype("<f2"), 2.0**-11, 64),
)
_INTEGER_TYPES = ("<i1", "<i2", "<i4", "<i8")
_KEY_BITS = 24  # of `_order_keys`: 7 signs and 17 comparisons
_CHUNK = 1 << 18  # candidates that are looked at together
_NUMBER = re.compile(rb"-?\d{0,20}\.\d{6,20}(?:[eE][-+]?\d{1,3})?")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Plaintext that was found.

    Attributes:
      name: whose.
      how: `copy`, `scaled`, `permuted`, `element`, `integers`, `text` or `secret`.
      form: the format in which it lies there.
      offset: where, in bytes.
    """

    name: str
    how: str
    form: str
    offset: int


class Search:
    """What must not be seen, ready to be searched for."""

    def __init__(
        self,
        plain: Mapping[str, np.ndarray],
        secrets: Mapping[str, bytes] | None = None,
        precision: float = 1e-8,
    ):
        """Prepares tables.

        Args:
          plain: arrays by name.
          secrets: keys by name, of at least 16 bytes.
          precision: to which the values are known, relative to each: those that an enclave
            computes from blinded products differ by rounding.
        """
        self._precision = precision
        # What many names have is searched for once, under the first.
        distinct: dict[Any, tuple[str, np.ndarray]] = {}
        for name, value in ((n, np.asarray(v)) for n, v in plain.items()):
            distinct.setdefault((value.shape, value.dtype, value.tobytes()), (name, value))
        plain = dict(distinct.values())
        floats = {
            n: np.asarray(v, np.float64)
            for n, v in plain.items()
            if not np.issubdtype(v.dtype, np.integer) and v.dtype != bool
        }
        self._names = list(floats)
        self._runs, self._run_names = _runs(floats)
        self._run_keys = _order_keys(self._runs.T)
        order = np.argsort(self._run_keys, kind="stable")
        self._runs, self._run_names = self._runs[order], self._run_names[order]
        self._run_keys = self._run_keys[order]
        self._has_key = np.zeros(1 << _KEY_BITS, bool)
        self._has_key[self._run_keys] = True
        self._strides = sorted({1} | {s for v in floats.values() for s in _strides(v.shape)})
        self._groups = _groups(floats)
        self._elements = _Elements(floats)
        self._bytes = _Needles([*_integer_needles(plain), *_secret_needles(secrets or {})])
        values = [v[_uncommon(v)] for v in floats.values()]
        self._values = np.concatenate([np.abs(v) for v in values]) if values else np.zeros(0)
        self._owners = np.repeat(np.arange(len(values)), [v.size for v in values])
        order = np.argsort(self._values)
        self._values, self._owners = self._values[order], self._owners[order]

    def findings(self, seen: bytes | np.ndarray) -> list[Finding]:
        """All plaintext in these bytes; of a tensor's each form and format, the first place."""
        raw = np.frombuffer(seen, np.uint8) if isinstance(seen, bytes) else seen
        raw = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        first: dict[tuple[str, str, str], Finding] = {}
        for found in self._search(raw):
            key = found.name, found.how, found.form
            if key not in first or first[key].offset > found.offset:
                first[key] = found
        return sorted(first.values(), key=lambda f: (f.offset, f.name, f.how))

    def _search(self, raw: np.ndarray) -> Iterator[Finding]:
        yield from self._bytes.find(raw)
        yield from self._elements.find(raw)
        yield from self._texts(raw)
        for form, dtype, roundoff, step in FORMATS:
            tolerance = max(self._precision, 2 * roundoff)
            for offset in range(dtype.itemsize):
                values, places = _plausible(raw, dtype, offset, step)
                if len(values) < RUN:
                    continue
                for found in (
                    self._find_runs(values, tolerance),
                    self._find_permuted(values, tolerance),
                ):
                    for name, how, place in found:
                        where = offset + int(places[place]) * dtype.itemsize
                        yield Finding(name, how, form, where)

    def _find_runs(self, x: np.ndarray, tolerance: float) -> Iterator[tuple[str, str, int]]:
        for stride in self._strides:
            count = len(x) - (RUN - 1) * stride
            if count <= 0 or not len(self._runs):
                continue
            keys = _order_keys([x[j * stride : j * stride + count] for j in range(RUN)])
            likely = np.flatnonzero(self._has_key[keys])
            for hits, runs in _pairs(keys[likely], keys[likely], self._run_keys):
                windows = likely[hits]
                seen = x[windows[:, None] + stride * np.arange(RUN)]
                plain = self._runs[runs]
                scale, same = _proportional(seen, plain, tolerance)
                for i in np.flatnonzero(same):
                    how = "copy" if abs(scale[i] - 1) <= tolerance else "scaled"
                    yield self._names[self._run_names[runs[i]]], how, windows[i]

    def _find_permuted(self, x: np.ndarray, tolerance: float) -> Iterator[tuple[str, str, int]]:
        size = np.abs(x)
        for (length, stride), (names, profiles, moments) in self._groups.items():
            if len(x) <= (length - 1) * stride:
                continue
            seen = _moments(size, length, stride)
            # Rounding of single values averages out, so that this is wide enough.
            reach = 4 * tolerance * seen[0]
            for windows, owners in _pairs(seen[0] - reach, seen[0] + reach, moments[0]):
                near = np.abs(seen[1][windows] / moments[1][owners] - 1) < 12 * tolerance
                windows, owners = windows[near], owners[near]
                for start in range(0, len(windows), max(1, _CHUNK // length)):
                    part = slice(start, start + max(1, _CHUNK // length))
                    w, o = windows[part], owners[part]
                    sizes = np.sort(size[w[:, None] + stride * np.arange(length)], axis=1)
                    _, same = _proportional(sizes, profiles[o], tolerance)
                    for i in np.flatnonzero(same):
                        yield self._names[names[o[i]]], "permuted", w[i]

    def _texts(self, raw: np.ndarray) -> Iterator[Finding]:
        for match in _NUMBER.finditer(raw.tobytes()):
            text = match.group().decode()
            digits = len(re.sub(r"[eE].*|\D", "", text).lstrip("0"))
            value = abs(float(text))
            if digits < 8 or not len(self._values) or not np.isfinite(value):
                continue
            at = np.searchsorted(self._values, value)
            for i in (at - 1, at):
                if 0 <= i < len(self._values):
                    near = max(10.0 ** (1 - digits), 1e-10) * value
                    if abs(self._values[i] - value) <= near:
                        name = self._names[self._owners[i]]
                        yield Finding(name, "text", "decimal", match.start())


class _Needles:
    """Byte strings of at least 8, found by one word of each."""

    def __init__(self, needles: Sequence[tuple[str, str, str, bytes]]):
        """Takes (name, how, form, bytes) of each."""
        self._needles = needles
        self._places = np.array([_rarest_word(n[3]) for n in needles], np.int64)
        words = [
            int.from_bytes(n[3][p : p + 8], "little")
            for n, p in zip(needles, self._places, strict=True)
        ]
        words = np.array(words, np.uint64)
        self._order = np.argsort(words, kind="stable")
        self._words = words[self._order]

    def find(self, raw: np.ndarray) -> Iterator[Finding]:
        for offset in range(8):
            words = raw[offset : offset + (len(raw) - offset) // 8 * 8].view("<u8")
            for places, found in _pairs(words, words, self._words):
                for place, number in zip(places, self._order[found], strict=True):
                    name, how, form, content = self._needles[number]
                    start = offset + 8 * int(place) - int(self._places[number])
                    if start >= 0 and raw[start : start + len(content)].tobytes() == content:
                        yield Finding(name, how, form, start)


def _rarest_word(content: bytes) -> int:
    """Where in a needle its 8 most varied bytes begin."""
    return max(range(len(content) - 7), key=lambda i: len(set(content[i : i + 8])))


def _pairs(
    low: np.ndarray, high: np.ndarray, table: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (i, j) with ``low[i] <= table[j] <= high[i]``, in chunks; `table` is sorted."""
    first = np.searchsorted(table, low, "left")
    counts = np.searchsorted(table, high, "right") - first
    counts[counts < 0] = 0  # where a bound is not a number
    hits = np.flatnonzero(counts)
    ends = np.cumsum(counts[hits])
    start = 0
    while start < len(hits):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _CHUNK, "right")))
        part = hits[start:stop]
        repeats = counts[part]
        within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        yield np.repeat(part, repeats), np.repeat(first[part], repeats) + within
        start = stop


def _plausible(
    raw: np.ndarray, dtype: np.dtype, offset: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bytes as values of a format, and the places of those that stand among their likes."""
    size = dtype.itemsize
    count = max(0, len(raw) - offset) // size
    with np.errstate(all="ignore"):
        x = raw[offset : offset + count * size].view(dtype).astype(np.float64)
        if count < RUN:
            return x[:0], np.zeros(0, np.int64)
        exponent = np.frexp(x)[1]
        good = np.isfinite(x)
        joined = good[1:] & good[:-1]
        joined &= (np.abs(np.diff(exponent)) <= step) | (x[1:] == 0) | (x[:-1] == 0)
    breaks = np.concatenate([[0], np.cumsum(~joined)])
    starts = np.flatnonzero(breaks[RUN - 1 :] == breaks[: count - RUN + 1])
    marks = np.zeros(count + 1, np.int64)
    marks[starts] += 1
    marks[starts + RUN] -= 1
    kept = np.cumsum(marks[:-1]) > 0
    # Zeros alone hold nothing, and there may be much of them.
    kept &= (x != 0) | _near_nonzero(x)
    places = np.flatnonzero(kept)
    return x[places], places


def _near_nonzero(x: np.ndarray) -> np.ndarray:
    """Whether one of the 256 values before and after is not zero."""
    total = np.concatenate([[0], np.cumsum(x != 0)])
    index = np.arange(len(x))
    return total[np.minimum(index + 257, len(x))] > total[np.maximum(index - 256, 0)]


def _order_keys(columns: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """What scaling leaves of windows of eight values: their signs and how their sizes compare."""
    columns = list(columns)
    key = np.zeros(len(columns[0]), np.uint32)
    sizes = [np.abs(c) for c in columns]
    negative = [c < 0 for c in columns]
    bit = 0
    for j in range(1, RUN):
        # Relative to the first one's.
        key |= (negative[j] ^ negative[0]).astype(np.uint32) << np.uint32(bit)
        bit += 1
    for apart in (1, 2, 4):
        for j in range(RUN - apart):
            key |= (sizes[j] < sizes[j + apart]).astype(np.uint32) << np.uint32(bit)
            bit += 1
    return key


def _proportional(
    seen: np.ndarray, plain: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the factor between the two, and whether it is one for all values."""
    with np.errstate(all="ignore"):
        largest = np.abs(plain).argmax(axis=1)[:, None]
        scale = np.take_along_axis(seen, largest, 1) / np.take_along_axis(plain, largest, 1)
        expected = scale * plain
        allowed = 2 * tolerance * np.abs(expected)
        allowed += 1e-12 * np.abs(np.take_along_axis(seen, largest, 1))
        same = (np.abs(seen - expected) <= allowed).all(axis=1)
        same &= np.isfinite(scale[:, 0]) & (scale[:, 0] != 0)
    return scale[:, 0], same


def _uncommon(x: np.ndarray) -> np.ndarray:
    """Which values have more than 16 significant bits, so that no constant is one of them."""
    mantissa = np.frexp(x)[0] * 2.0**16
    return np.isfinite(x) & (mantissa != np.round(mantissa))


def _telling(rows: np.ndarray) -> np.ndarray:
    """Which rows are more than counts and multiples of one number: enough values differ in size."""
    sizes = np.sort(np.abs(rows), axis=1)
    distinct = 1 + (np.diff(sizes, axis=1) > 1e-6 * sizes[:, 1:]).sum(axis=1)
    distinct -= sizes[:, 0] == 0
    unit = np.where(sizes > 0, sizes, np.inf).min(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        multiples = sizes / np.where(np.isfinite(unit), unit, 1)
        known = (np.abs(multiples - np.round(multiples)) < 1e-6).all(axis=1)
        steps = np.diff(rows, axis=1)
        known |= (np.abs(steps - steps[:, :1]) <= 1e-9 * np.abs(steps[:, :1])).all(axis=1)
    return (distinct >= max(4, rows.shape[1] // 4)) & ~known & np.isfinite(rows).all(axis=1)


def _runs(plain: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    runs, names = [np.zeros((0, RUN))], [np.zeros(0, np.int64)]
    for number, value in enumerate(plain.values()):
        lines = [value.reshape(1, -1)]
        lines += [np.moveaxis(value, a, -1).reshape(-1, value.shape[a]) for a in range(value.ndim)]
        for line in lines:
            whole = line.shape[1] // RUN * RUN
            windows = line[:, :whole].reshape(-1, RUN)
            windows = windows[_telling(windows)]
            runs.append(windows)
            names.append(np.full(len(windows), number))
    return np.concatenate(runs), np.concatenate(names)


def _strides(shape: tuple[int, ...]) -> set[int]:
    """How far apart neighbours along an axis lie, also in a transposed matrix."""
    if len(shape) < 2:
        return set()
    trailing = {int(np.prod(shape[a + 1 :])) for a in range(len(shape) - 1)}
    return trailing | {int(np.prod(shape[:-1]))}


def _groups(plain: Mapping[str, np.ndarray]) -> dict[tuple[int, int], tuple[np.ndarray, ...]]:
    """Rows, columns and whole tensors by length and stride: owners, sorted sizes, moments."""
    rows: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
    for number, value in enumerate(plain.values()):
        if value.size < 2 * RUN:
            continue
        matrix = value.reshape(-1, value.shape[-1])
        m, n = matrix.shape
        for (length, stride), lines in {
            (n, 1): matrix,
            (n, m): matrix,
            (m, n): matrix.T,
            (m, 1): matrix.T,
            (m * n, 1): matrix.reshape(1, -1),
        }.items():
            if length >= 2 * RUN:
                rows.setdefault((length, stride), []).append((number, lines))
    groups = {}
    for key, entries in rows.items():
        lines = np.concatenate([e[1] for e in entries])
        owners = np.concatenate([np.full(len(e[1]), e[0]) for e in entries])
        telling = _telling(lines)
        profiles, owners = np.sort(np.abs(lines[telling]), axis=1), owners[telling]
        if not len(owners):
            continue
        moments = np.stack(_moments(profiles.reshape(-1), key[0], 1))[:, :: key[0]]
        order = np.argsort(moments[0])
        groups[key] = owners[order], profiles[order], moments[:, order]
    return groups


def _moments(sizes: np.ndarray, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """For each window two ratios of sums of powers, which neither order nor scale changes."""
    with np.errstate(all="ignore"):
        one, two, three = (_window_sums(sizes**k, length, stride) for k in (1, 2, 3))
        ratios = length * two / one**2, length**2 * three / one**3
        # No sum of powers is negative, so -1 is like nothing.
        first, second = (np.where(np.isfinite(r), r, -1.0) for r in ratios)
        return first, second


def _window_sums(x: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Sums of `length` values `stride` apart, by doubling, which cancels nothing."""
    count = len(x) - (length - 1) * stride
    total, done = np.zeros(count), 0
    block, width = x, 1
    while width <= length:
        if length & width:
            total += block[done * stride : done * stride + count]
            done += width
        width *= 2
        if width <= length:
            half = width // 2 * stride
            block = block[:-half] + block[half:]
    return total


class _Elements:
    """Words of 8 bytes that are a value in float64, or two neighbours in float32."""

    def __init__(self, plain: Mapping[str, np.ndarray]):
        words, owners, forms = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], []
        for number, value in enumerate(plain.values()):
            uncommon = value[_uncommon(value)].astype("<f8").view("<u8")
            parts = [(uncommon, 0)]
            for order in (value, value.T)[: max(1, min(value.ndim, 2))]:
                narrow = order.reshape(-1).astype("<f4")
                kept = _uncommon(narrow) & (np.abs(narrow) > 1e-30)
                kept = kept[1:] & kept[:-1] & (narrow[1:] != narrow[:-1])
                couples = np.stack([narrow[:-1], narrow[1:]], axis=-1)[kept]
                parts.append((couples.reshape(-1).view("<u8"), 1))
            for part, form in parts:
                words.append(part)
                owners.append(np.full(len(part), number))
                forms.append(np.full(len(part), form))
        self._words, first = np.unique(np.concatenate(words), return_index=True)
        self._owners = np.concatenate(owners)[first]
        self._forms = np.concatenate([np.zeros(0, np.int64), *forms])[first]
        self._names = list(plain)

    def find(self, raw: np.ndarray) -> Iterator[Finding]:
        if not len(self._words):
            return
        for offset in range(8):
            words = raw[offset : offset + (len(raw) - offset) // 8 * 8].view("<u8")
            at = np.minimum(np.searchsorted(self._words, words), len(self._words) - 1)
            for place in np.flatnonzero(self._words[at] == words):
                found = at[place]
                form = ("float64", "float32")[self._forms[found]]
                name = self._names[self._owners[found]]
                yield Finding(name, "element", form, offset + 8 * int(place))


def _integer_needles(plain: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str, str, bytes]]:
    types = [(t, np.dtype(t)) for t in _INTEGER_TYPES] + [f[:2] for f in FORMATS]
    for name, value in plain.items():
        flat = value.reshape(-1).astype(np.float64)
        if not np.isfinite(flat).all() or (flat != np.round(flat)).any():
            continue
        for start in range(0, flat.size // INTEGERS * INTEGERS, INTEGERS):
            run = flat[start : start + INTEGERS]
            jumps = np.diff(run)
            # Counts and repeats are known; a few ones at places of their own are not.
            if len(np.unique(jumps)) < 3 or np.abs(run).max() > 127:
                continue
            for form, dtype in types:
                yield name, "integers", form.strip("<"), run.astype(dtype).tobytes()


def _secret_needles(secrets: Mapping[str, bytes]) -> Iterator[tuple[str, str, str, bytes]]:
    for name, secret in secrets.items():
        half = len(secret) // 2
        for part in {secret[:half], secret[half:]}:
            yield name, "secret", "raw", part
            yield name, "secret", "hex", part.hex().encode()
            yield name, "secret", "hex", part.hex().upper().encode()
            for lead in range(3):
                # What of base64 does not depend on its neighbours.
                text = base64.b64encode(bytes(lead) + part)
                text = text[-(-8 * lead // 6) : (lead + len(part)) * 8 // 6]
                yield name, "secret", "base64", text
                yield name, "secret", "base64", text.replace(b"+", b"-").replace(b"/", b"_")
