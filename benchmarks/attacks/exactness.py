"""S10: whether the scheme gives the plain products, how much it rounds, and what blinding costs.

No attack, but what confidentiality is paid with. The scheme's own arithmetic blinds plain operands,
JAX multiplies, and the results are compared to the exact ones. Deviation in float64 is measured on
a trace's own products; in other formats on normal operands of one size, and in float32 on what
ReLU makes of X, as a multiple of what plain JAX rounds off in the same format, operands included.
Products with a zero round nothing off, and blinding leaves no zeros: half of X being zero, plain
JAX rounds less by √2, which the limit allows for. The gradient of W carries the rounding of decoys
as well: up to the root of rows over decoys times that of Y.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tempo_jax as tempo
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import Trace
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import KeyClass, Layout
from enclave_runtime.schemes import SCHEMES, Scheme

ROUNDING = {"float32": 6.0, "bfloat16": 3.5, "float16": 3.5}  # limits, over plain JAX's
MASKED_ROUNDING = {"float32": 30.0, "bfloat16": 20.0, "float16": 20.0}  # under full masks
DEVIATION, MIXING_DEVIATION = (
    1e-10,
    1e-9,
)  # limits in float64, for kept keys and for keys per product
COST_LIMIT, MASKED_COST_LIMIT = 6.0, 12.0  # blinding over that of a signed permutation
ROWS, INNER, COLUMNS = 2048, 1024, 512  # of the product that is rounded
RESULTS = ("y", "dx", "dw")
TIMINGS = 7  # of a family, whose median counts


class _Blinder(NamedTuple):
    """A scheme with keys for the three axes of a product; the row key has decoys if it does."""

    scheme: Scheme
    keys: dict[int, Any]
    stream: Callable[[], Any]
    decoys: int

    def blind(self, plain: Any, classes: tuple[int, int], parities: tuple[int, int]) -> Any:
        """The blinded operand, and what unblinding needs to know of it."""
        rows = self.decoys * (classes[0] == 0)
        out = np.empty((plain.shape[0] + rows, plain.shape[1]), plain.dtype)
        layout = Layout(classes, self._parities(parities))
        return out, self.scheme.blind(plain, layout, self.keys, out, self.stream)

    def unblind(
        self, blinded: Any, classes: tuple[int, int], parities: tuple[int, int], operands: Any
    ) -> Any:
        """The plain result."""
        layout = Layout(classes, self._parities(parities))
        return self.scheme.unblind(np.asarray(blinded), layout, self.keys, operands)

    def _parities(self, parities: tuple[int, int]) -> tuple[int, int]:
        # Orthogonal groups have one polarity; their parities say whether signs apply.
        return (1, 1) if self.scheme.group.orthogonal else parities


def _blinder(scheme: Scheme, m: int, n: int, p: int) -> _Blinder:
    schedule, uses = KeySchedule(), itertools.count()

    def stream() -> Any:
        return schedule.stream("exactness", next(uses))

    decoys = scheme.decoys(m)
    classes = KeyClass(m, decoys=decoys), KeyClass(n), KeyClass(p)
    keys = {i: scheme.draw(c, stream()) for i, c in enumerate(classes)}
    return _Blinder(scheme, keys, stream, decoys)


def _multiply(a: Any, b: Any) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.matmul(a, b, preferred_element_type=wide)


def shielded(scheme: Scheme, x: Any, w: Any, g: Any) -> tuple[Any, Any, Any]:
    """Y, dX and dW as the library computes them, in the operands' format."""
    (m, n), p = x.shape, w.shape[1]
    blinder = _blinder(scheme, m, n, p)
    blinded_x, of_x = blinder.blind(x, (0, 1), (1, 1))
    blinded_w, of_w = blinder.blind(w, (1, 2), (0, 1))
    blinded_g, of_g = blinder.blind(g, (0, 2), (0, 0))
    y = blinder.unblind(_multiply(blinded_x, blinded_w), (0, 2), (1, 1), (of_x, of_w))
    dx = blinder.unblind(_multiply(blinded_g, blinded_w.T), (0, 1), (0, 0), (of_g, of_w))
    dw = blinder.unblind(_multiply(blinded_x.T, blinded_g), (1, 2), (1, 0), (of_x, of_g))
    return tuple(v.astype(x.dtype) for v in (y, dx, dw))  # pyright: ignore[reportReturnType]


def deviations(
    scheme: Scheme, x: Any, w: Any, g: Any, dtype: str
) -> dict[str, tuple[float, float]]:
    """Root mean square errors over that of the exact result: shielded and plain, by result."""
    exact = x @ w, g @ w.T, x.T @ g
    x, w, g = (np.asarray(jnp.asarray(v).astype(dtype)) for v in (x, w, g))
    plain = [_multiply(a, b).astype(dtype) for a, b in ((x, w), (g, w.T), (x.T, g))]
    found = {}
    for name, truth, ours, theirs in zip(
        RESULTS, exact, shielded(scheme, x, w, g), plain, strict=True
    ):
        size = np.linalg.norm(truth)
        errors = (np.linalg.norm(np.asarray(v, np.float64) - truth) / size for v in (ours, theirs))
        found[name] = tuple(float(e) for e in errors)
    return found


@functools.cache
def blinding_costs() -> dict[str, float]:
    """Nanoseconds for each blinded element, by scheme, as the enclave measured them here."""
    with tempo.Enclave.launch() as enclave:
        costs = enclave.costs
    return {name: costs.cost_of(scheme()).blinding for name, scheme in SCHEMES.items()}


def family(scheme: Scheme, x: Any, w: Any, g: Any) -> Callable[[], None]:
    """The enclave's work for one product of a training step; keys are drawn before.

    Returns:
      Blinds x, w and g, with decoys and mask, and unblinds y, dx and dw, when called.
    """
    (m, n), p = x.shape, w.shape[1]
    blinder = _blinder(scheme, m, n, p)
    made: list[tuple[Any, Any, Any]] = []

    def work() -> None:
        blinded_x, of_x = blinder.blind(x, (0, 1), (1, 1))
        blinded_w, of_w = blinder.blind(w, (1, 2), (0, 1))
        blinded_g, of_g = blinder.blind(g, (0, 2), (0, 0))
        if not made:
            pairs = (blinded_x, blinded_w), (blinded_g, blinded_w.T), (blinded_x.T, blinded_g)
            made.append(tuple(np.asarray(_multiply(a, b)) for a, b in pairs))  # pyright: ignore
        y, dx, dw = made[0]
        y = blinder.unblind(y, (0, 2), (1, 1), (of_x, of_w))
        dx = blinder.unblind(dx, (0, 1), (0, 0), (of_g, of_w))
        dw = blinder.unblind(dw, (1, 2), (1, 0), (of_x, of_g))
        jax.block_until_ready((y, dx, dw))

    # Compiles what there is to compile.
    work()
    return work


def family_cost(scheme: Scheme, x: Any, w: Any, g: Any) -> float:
    """Median time of a family over that of a signed permutation's, timed in turn."""
    works = [family(s, x, w, g) for s in (scheme, SCHEMES["signed_permutation"]())]
    seconds: tuple[list[float], ...] = ([], [])
    for _ in range(TIMINGS):
        for work, kept in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            kept.append(time.perf_counter() - start)
    return float(np.median(seconds[0]) / np.median(seconds[1]))


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Measures deviation, rounding and cost of a scheme of the library.

    Args:
      trace: whose first step's products are compared; controls that are no scheme of the library
        give nothing.
      rng: draws normal operands.
    """
    if trace.scheme not in SCHEMES or SCHEMES[trace.scheme]().exact:
        return []  # controls, and shares, whose rounding is that of fixed point
    scheme = SCHEMES[trace.scheme]()
    names = [n for n in trace.names if trace.outside(n) and "." not in n]
    truths = [trace.truth[0][name] for name in names]
    exact = [deviations(scheme, t.x, t.w, t.g, "float64") for t in truths]
    worst = max(found[result][0] for found in exact for result in RESULTS)
    limit = MIXING_DEVIATION if scheme.keys_per_product else DEVIATION
    note = f"worst result of {len(names)} products"
    measurements = [_cost("deviation in float64", worst, limit, note)]
    shapes = (ROWS, INNER), (INNER, COLUMNS), (ROWS, COLUMNS)
    x, w, g = (rng.normal(size=shape) for shape in shapes)
    decoys = scheme.decoys(ROWS)
    masked = getattr(scheme, "mask_energy", 0)
    rounding = MASKED_ROUNDING if masked else ROUNDING
    cases = [("", x, dtype, limit) for dtype, limit in rounding.items()]
    cases.append((", x after ReLU", np.maximum(x, 0), "float32", rounding["float32"]))
    for kind, left, dtype, limit in cases:
        for result, (ours, theirs) in deviations(scheme, left, w, g, dtype).items():
            note, factor = "over plain JAX's", 1.0
            if decoys and result == "dw":
                factor = float(np.sqrt(ROWS / decoys))
                note += f", which allows for √(rows/decoys) = {factor:.1f}"
            if kind and result != "dx":
                factor *= float(np.sqrt(left.size / np.count_nonzero(left)))
                note += ", and for zeros"
            metric = f"{dtype} error of {result}{kind}"
            measurements.append(_cost(metric, ours / theirs, limit * factor, note))
    costs, limit = blinding_costs(), MASKED_COST_LIMIT if masked else COST_LIMIT
    relative = costs[scheme.name] / costs["signed_permutation"]
    note = "blinding an element over a signed permutation's, as calibrated"
    measurements.append(_cost("cost", relative, limit, note))
    relative = family_cost(scheme, *(v.astype(np.float32) for v in (x, w, g)))
    note = "x, w, g, y, dx and dw of one product over a signed permutation's, timed in turn"
    return [*measurements, _cost("cost of a family", relative, limit, note)]


def _cost(metric: str, value: float, threshold: float, note: str) -> Measurement:
    """A measurement of no leak."""
    return measure(
        "S10", metric, value, chance=0, threshold=threshold, best=float("inf"), note=note
    )
