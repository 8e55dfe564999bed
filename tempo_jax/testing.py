"""Instruments for testing a shielded function: what it shows, and how far from plain it is.

Whether a step's deviation from plain JAX is the shield's, or the step's own conditioning, `compare`
tells. Untrusted; it computes in the clear, for the developer of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tempo_jax.api.shielded import Shielded, tracing_inside
from tempo_jax.jaxprs import trace
from tempo_jax.jaxprs.reorder import reordered
from tempo_jax.jaxprs.types import to_physical
from tempo_jax.running.observation import HostView, Product, host_view
from tempo_jax.schemes import Group
from tempo_jax.sealing.array import is_sealed

__all__ = ["Comparison", "HostView", "LeafComparison", "Product", "compare", "host_view"]

OURS, PLAIN = "ours", "plain's own"
Verdict = Literal["ours", "plain's own"]

# How much further than its own orders of summation lie apart a shielded step may be from plain.
# Permutations and signs only reorder sums, and a few orders are too few to see the largest error.
# What mixes rounds what it mixes: `Mixing` by some hundred times a product's own rounding.
_REORDERS, _MIXES = 32.0, 2048.0
# A step with kinks (ReLU) can make much of that, in the few units that it switches, so it is tried
# on plain as well: 8 times as coarse, lest one try switch none. 1e-4 in float32.
_MIXED_ROUNDING = 800.0  # times a dtype's epsilon
_NARROWED = 2.0  # times what a scheme says that operands of fewer bits round; more would drown all
_AS_ROUNDED = 2.0  # how much further than that one try a shielded step may be
# Of a leaf in which plain JAX has not two digits in common with itself nothing can be said.
_NO_DIGITS = 1e-2
_SHOWN = 12  # leaves in the text


@dataclasses.dataclass(frozen=True)
class LeafComparison:
    """One leaf of the last result.

    Attributes:
      name: as the user writes it.
      shielded: largest difference between shielded and plain, over the largest plain element.
      own: the same between plain and plain with its sums in other orders.
      verdict: "plain's own" if that explains the shielded error, or `rounded` does, else "ours".
      rounded: the same as `own` where plain's products are also rounded 8 times as coarsely as
        by a scheme that mixes; 0 under one that only reorders.
    """

    name: str
    shielded: float
    own: float
    verdict: Verdict
    rounded: float = 0.0

    @property
    def by_rounding(self) -> bool:
        """Whether it is what the scheme rounds that explains an error far beyond `own`."""
        return self.verdict == PLAIN and self.rounded > 0 and self.shielded > _REORDERS * self.own


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; its text is a table.

    Attributes:
      function: the step's name.
      steps: how many were taken.
      leaves: one for each leaf of the last result, in its order.
    """

    function: str
    steps: int
    leaves: tuple[LeafComparison, ...]

    @property
    def verdict(self) -> Verdict:
        """`ours` if it is that of any leaf."""
        return OURS if any(leaf.verdict == OURS for leaf in self.leaves) else PLAIN

    def __str__(self) -> str:
        """The leaves with the largest shielded errors, ours first, and the verdict."""
        ranked = sorted(self.leaves, key=lambda leaf: (leaf.verdict != OURS, -leaf.shielded))
        shown = ranked[:_SHOWN]
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        width = max([len(leaf.name) for leaf in shown] + [4])
        mixes = any(leaf.rounded for leaf in self.leaves)
        lines = [
            f"{self.function}: shielded and plain after {steps}, largest difference over "
            "largest element",
            f"  {'leaf':{width}}  {'shielded':>10}  {PLAIN:>11}"
            + ("  and rounded" if mixes else ""),
        ]
        lines += [
            f"  {leaf.name:{width}}  {leaf.shielded:>10.1e}  {leaf.own:>11.1e}  "
            + (f"{leaf.rounded:>11.1e}  " if mixes else "")
            + leaf.verdict
            for leaf in shown
        ]
        if len(ranked) > _SHOWN:
            lines.append(f"  and {len(ranked) - _SHOWN} more, none with a larger error")
        ours = sum(leaf.verdict == OURS for leaf in self.leaves)
        rounded = sum(leaf.by_rounding for leaf in self.leaves)
        if ours:
            lines.append(
                f"verdict: {OURS}, in {ours} of {len(self.leaves)} leaves: neither another order "
                "of plain's sums nor what the scheme rounds explains them"
            )
        elif rounded:
            lines.append(
                f"verdict: {PLAIN}, up to what the scheme rounds: in {rounded} of "
                f"{len(self.leaves)} leaves the error is far beyond other orders of plain's sums, "
                "and of the size that the scheme's rounding of its products explains. In float64 "
                "it would shrink with the rounding, and a fault would stay"
            )
        else:
            lines.append(
                f"verdict: {PLAIN}, plain JAX differs from itself as much when its sums are "
                "reordered"
            )
        return "\n".join(lines)


def compare(step: Shielded[..., Any], *args: Any, steps: int = 3, **kwargs: Any) -> Comparison:
    """Compares a shielded step with plain JAX, and plain JAX with itself, and prints the table.

    Takes the steps three times in the clear: compiled, operation by operation, and with the terms
    of every sum permuted. Their distances from the first are what the step makes of
    rounding. A shielded error far beyond them is a fault, of a device or of this library, except
    that a scheme which mixes may be as far beyond as it rounds more. Under such a scheme they are
    taken a fourth time, with noise on every product: `Mixing` rounds products in float32 by some
    1e-5 where plain rounds by 1e-7, and the noise is 8 times as large, since a rounding matters
    most where it switches one of a few units (ReLU); where operands cross in bfloat16 it is twice
    what that rounds. Where the text says that this explains an
    error and you doubt it, compare in float64 (`jax_enable_x64`): what is rounding shrinks to
    1e-10 and less there, and a fault stays.

    Args:
      step: what `shield` returned, in a process that is both client and host.
      *args: the state and the batch as for a call, plain. What the step carries is carried from
        one step to the next; the rest is the same in each. Nothing is donated.
      steps: how many to take, at least 1.
      **kwargs: likewise.

    Returns:
      The errors of each leaf of the last result and a verdict; its text was printed.

    Raises:
      ValueError: `steps` is less than 1.

    Example:
      >>> import tempo_jax as tempo
      >>> with tempo.Enclave.launch() as enclave:
      ...     step = tempo.shield(lambda w, x: w - 0.1 * x, enclave=enclave)
      ...     found = tempo.testing.compare(step, jnp.ones(3), jnp.ones(3))  # doctest: +ELLIPSIS
      <lambda>: shielded and plain after 3 steps, largest difference over largest element
      ...
      >>> found.verdict
      "plain's own"
    """
    if steps < 1:
        raise ValueError(f"compare: steps is {steps}, expected at least 1")
    flat = _Flat(step, args, kwargs)
    plain = flat.take(jax.jit(flat.plain), steps)
    with jax.disable_jit():
        others = [flat.take(flat.plain, steps)]
    closed = trace.trace(flat.plain, flat.leaves)
    others.append(flat.take(jax.jit(reordered(closed, seed=0)), steps))
    rounded = plain
    if not flat.only_reorders:
        rounded = flat.take(jax.jit(reordered(closed, 1, flat.rounding)), steps)
    shielded = flat.take(flat.shielded, steps)
    allowed = _REORDERS if flat.only_reorders else _MIXES
    leaves = [
        _compared(name, shielded[i], plain[i], [x[i] for x in others], rounded[i], allowed, unit)
        for i, (name, unit) in enumerate(zip(flat.names, flat.units, strict=True))
    ]
    found = Comparison(step._name, steps, tuple(leaves))
    print(found)
    return found


class _Flat:
    """A step, plain and shielded, as a function of flat arguments that returns flat results."""

    def __init__(self, step: Shielded[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._step = step
        signature = step._signature(args, kwargs)
        program = step._program(signature)
        request = program.plan.request
        self._structure = signature.structure
        self._carried = request.carried
        self.only_reorders = not request.offload or request.scheme.group in (
            Group.SIGNED_PERMUTATION,
            Group.SCALED_PERMUTATION,
        )
        # Under `jax.disable_jit` NumPy would compute on arrays of its own.
        self.leaves = [jnp.asarray(x) for x in signature.leaves]
        arguments = ["".join(leaf) for leaf in signature.names()]
        count = program.out_structure.num_leaves
        numbered = jax.tree.unflatten(program.out_structure, range(count))
        paths, _ = jax.tree_util.tree_flatten_with_path(numbered)
        self.names = [f"result{jax.tree_util.keystr(path)}" for path, _ in paths]
        for i, position in self._carried.items():
            self.names[position] = arguments[i]
        self.units = [_unit(aval.dtype) for aval in program.types]
        # Of a step in float64 nothing is narrowed, and a fault must show.
        single = _unit(np.float32)
        narrowed = request.scheme.narrowing("float32") if single in self.units else 0.0
        self.rounding = max(_MIXED_ROUNDING, _NARROWED * narrowed / single)

    def plain(self, *leaves: Any) -> list[Any]:
        """The function itself."""
        args, kwargs = self._step._statics.release(jax.tree.unflatten(self._structure, leaves))
        with tracing_inside():
            result = self._step._function(*args, **kwargs)
        return jax.tree.leaves(self._step._statics.hold_leaves(result))

    def shielded(self, *leaves: Any) -> list[Any]:
        """The shielded function."""
        args, kwargs = self._step._statics.release(jax.tree.unflatten(self._structure, leaves))
        result = self._step._statics.hold_leaves(self._step(*args, **kwargs))
        return jax.tree.leaves(result, is_leaf=is_sealed)

    def take(self, function: Callable[..., Sequence[Any]], steps: int) -> list[np.ndarray]:
        """The results of the last of some steps, as numbers."""
        leaves, results = list(self.leaves), []
        for _ in range(steps):
            results = function(*leaves)
            for i, position in self._carried.items():
                leaves[i] = results[position]
        return [_numbers(x) for x in self._step._enclave.open(list(results))]


def _unit(dtype: Any) -> float:
    """One rounding of a dtype, relative; 0 of what has none."""
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _numbers(x: Any) -> np.ndarray:
    if x.dtype == jax.dtypes.float0:
        return np.zeros(x.shape)
    array = np.asarray(to_physical(x))
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _compared(
    name: str,
    shielded: np.ndarray,
    plain: np.ndarray,
    others: Sequence[np.ndarray],
    rounded: np.ndarray,
    allowed: float,
    unit: float,
) -> LeafComparison:
    scale = float(np.max(np.abs(plain), initial=0.0, where=np.isfinite(plain))) or 1.0
    error = _distance(shielded, plain) / scale
    own = max(_distance(other, plain) for other in others) / scale
    coarse = _distance(rounded, plain) / scale
    explained = (
        error <= allowed * (own + unit) or error <= _AS_ROUNDED * coarse or own >= _NO_DIGITS
    )
    return LeafComparison(name, error, own, PLAIN if explained else OURS, coarse)


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference of two elements, infinite where one alone is not finite."""
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.where(same, 0.0, np.abs(x - y))
    return float(np.max(np.nan_to_num(differences, nan=np.inf), initial=0.0))
