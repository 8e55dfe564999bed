"""Fuses families that share their input, as attention's Q, K and V do.

Under keys per product, a value that is the input of several products would be blinded once for
each. Side by side, ``X [W₁ W₂ W₃]`` is one product: X and the sum of the input's gradients are
blinded once, and what the host sees has one row key instead of three. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from tempo_jax.families.finder import (
    CONTRACTED,
    FORWARD,
    TO_INPUT,
    TO_WEIGHT,
    Family,
    MatrixOperand,
)
from tempo_jax.families.matrices import Form
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Literal, Var

_ADDITIONS = (prims.add_p, prims.add_jaxvals_p)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Families whose products are computed side by side; usually a single one.

    Attributes:
      parts: the families, in program order.
    """

    parts: tuple[Family, ...]

    @property
    def others(self) -> list[Fused]:
        """The same equations as products of other matrices; parts share the form of their X."""
        return [Fused(parts) for parts in zip(*(f.others for f in self.parts), strict=True)]

    @property
    def primary(self) -> int:
        """Number of the first forward equation."""
        return self.parts[0].primary

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, contracted length and columns of all parts together."""
        rows, contracted, _ = self.parts[0].sizes
        return rows, contracted, sum(f.sizes[2] for f in self.parts)

    @property
    def copies(self) -> int:
        """Independent products in the batch, at least 1."""
        return self.parts[0].copies

    @property
    def numbers(self) -> Iterator[int]:
        """Numbers of all equations."""
        return (n for f in self.parts for n in f.members)

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """Which products there are: forward, by the input, by the weight."""
        kinds = (FORWARD, TO_INPUT, TO_WEIGHT)
        return tuple(k for k in kinds if self.parts[0].number(k) is not None)

    def equations(self, kind: tuple[str, str]) -> list[int]:
        """Numbers of the equations that one product of this kind stands for."""
        return [n for f in self.parts if (n := f.number(kind)) is not None]

    def operand(self, name: str) -> list[MatrixOperand]:
        """What stands side by side in an operand."""
        count = 1 if name == "x" else len(self.parts)
        return [f.operands[name] for f in self.parts[:count]]

    def matrix(self, name: str, value: Callable[[Var], jax.Array]) -> jax.Array:
        """An operand of all parts side by side."""
        matrices = [o.form.matrix(value(o.variable)) for o in self.operand(name)]
        if len(matrices) == 1:
            return matrices[0]
        return lax.concatenate(matrices, matrices[0].ndim - 1)

    def results(self, kind: tuple[str, str], product: jax.Array) -> dict[int, jax.Array]:
        """What the equations of this kind give, by their numbers.

        The gradients by the input are only ever added up: the first is given their sum.
        """
        numbers = self.equations(kind)
        forms: list[Form] = [f.members[n].out for f, n in zip(self.parts, numbers, strict=True)]
        if kind == TO_INPUT:
            values = [form.array(product) for form in forms[:1]]
            values += [jnp.zeros_like(values[0])] * (len(forms) - 1)
        else:
            values, start = [], 0
            for family, form in zip(self.parts, forms, strict=True):
                end = start + family.sizes[2]
                part = lax.slice_in_dim(product, start, end, axis=product.ndim - 1)
                values.append(form.array(part))
                start = end
        return dict(zip(numbers, values, strict=True))


def contracted(kind: tuple[str, str], rank: int) -> tuple[tuple[int], tuple[int]]:
    """The axes that a product of this kind contracts, of matrices of this rank."""
    left, right = CONTRACTED[kind]
    return (rank + left,), (rank + right,)


def fuse(jaxpr: Jaxpr, families: Sequence[Family], above: Mapping[Var, int]) -> list[Fused]:
    """Puts families together that share their input.

    Args:
      jaxpr: the flat program.
      families: families that may go out, in program order.
      above: for each variable the products on which it depends, as a bit set over equations.
    """
    sums = _Sums(jaxpr)
    groups: list[list[Family]] = []
    for family in families:
        for group in groups:
            if _fit(jaxpr, [*group, family], above, sums):
                group.append(family)
                break
        else:
            groups.append([family])
    fused = [Fused(tuple(group)) for group in groups]
    # Two fusions may each have to wait for the other; then none is made.
    if order(jaxpr, fused) is None:
        return [Fused((family,)) for family in families]
    return fused


def _fit(jaxpr: Jaxpr, group: Sequence[Family], above: Mapping[Var, int], sums: _Sums) -> bool:
    """Whether the last family can be put beside the others."""
    first, last = group[0], group[-1]
    x, y = first.operands["x"], last.operands["x"]
    if x.variable is not y.variable or x.form != y.form:
        return False
    kinds = [(m.left, m.right) for m in first.members.values()]
    if set(kinds) != {(m.left, m.right) for m in last.members.values()}:
        return False
    # One product has one dtype, one precision and one accumulator.
    for kind in kinds:
        a, b = (jaxpr.eqns[f.number(kind) or 0] for f in (first, last))
        if _types(a) != _types(b) or a.params["precision"] != b.params["precision"]:
            return False
    for kind in kinds:
        # Nothing that goes into one product of the group may come out of it.
        together = [f.number(kind) or 0 for f in group]
        bits = sum(1 << n for n in together)
        for n in together:
            if any(above.get(v, 0) & bits for v in jaxpr.eqns[n].invars if isinstance(v, Var)):
                return False
    gradients = [n for f in group if (n := f.number(TO_INPUT)) is not None]
    return sums.meet([jaxpr.eqns[n].outvars[0] for n in gradients])


def _types(eqn: JaxprEqn) -> list[Any]:
    return [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]


class _Sums:
    """Which values are only ever added to others."""

    def __init__(self, jaxpr: Jaxpr):
        self._uses: dict[Var, list[JaxprEqn | None]] = {}
        for eqn in jaxpr.eqns:
            for v in eqn.invars:
                if isinstance(v, Var):
                    self._uses.setdefault(v, []).append(eqn)
        for v in jaxpr.outvars:
            self._uses.setdefault(v, []).append(None)

    def _path(self, v: Var) -> list[Var]:
        """The sums that a value goes into, as long as it goes nowhere else."""
        path = [v]
        while len(uses := self._uses.get(v, [])) == 1:
            (eqn,) = uses
            if eqn is None or eqn.primitive not in _ADDITIONS:
                break
            v = eqn.outvars[0]
            path.append(v)
        return path

    def meet(self, values: Sequence[Var]) -> bool:
        """Whether the values count only by their sum."""
        if len(values) < 2:
            return True
        paths = [set(self._path(v)[1:]) for v in values]
        return bool(set.intersection(*paths))


def order(jaxpr: Jaxpr, fused: Sequence[Fused]) -> list[tuple[int, Fused | None]] | None:
    """An order in which every equation comes after what it needs.

    Returns:
      Numbers of equations, in program order as far as fusion allows, each with the fused
      product that it stands for (named by its first equation) or None; or None if there is no
      such order.
    """
    leader: dict[int, int] = {}
    owner: dict[int, Fused] = {}
    for f in fused:
        for kind in f.kinds:
            numbers = f.equations(kind)
            for n in numbers:
                leader[n] = numbers[0]
                owner[n] = f
    made_by = {v: leader.get(n, n) for n, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    needs: dict[int, set[int]] = {}
    for n, eqn in enumerate(jaxpr.eqns):
        wanted = needs.setdefault(leader.get(n, n), set())
        wanted |= {made_by[v] for v in eqn.invars if not isinstance(v, Literal) and v in made_by}
    out: list[tuple[int, Fused | None]] = []
    done: set[int] = set()
    for root in needs:
        pending = [root]
        opened: set[int] = set()
        while pending:
            n = pending[-1]
            missing = sorted(needs[n] - done - {n}, reverse=True)
            if n in done or not missing:
                pending.pop()
                if n not in done:
                    done.add(n)
                    out.append((n, owner.get(n)))
                continue
            if n in opened:
                return None
            opened.add(n)
            pending += missing
    return out
