"""Each rule that lets an equation run on blinded values: ``f(g·x) = g·f(x)``, checked in numbers.

A value is written as a string with one letter for each axis, naming its key class, and the
parity of its axes: ``"ab"`` is a matrix whose sign appears (a gradient), ``"ab:0"`` one whose
sign does not (its square), ``"ab:?"`` a leaf of the state, whose parity is still unknown. ``.``
is an axis of size 4 without a key; letters in upper case name classes whose key has no signs.
"""

from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import primitives as prims

from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import KeyClass, Layout
from tempo_jax.equivariance import rules
from tempo_jax.equivariance.classes import ONE, Axis, Keying, reduce_form, resolve_parity
from tempo_jax.equivariance.operands import Context, NotEquivariantError, Operand
from tempo_jax.equivariance.rules import commute, is_zero
from tempo_jax.jaxprs import equations, flatten, primitives, types
from tempo_jax.jaxprs.types import array_type
from tests.support.interpreter import blind
from tests.support.steps import SIGNED_PERMUTATION, uniform

SIZES = {"a": 6, "b": 5, "c": 3, "d": 6, "e": 4, "A": 6, "B": 5, ".": 4}


class Harness:
    """Runs equations on blinded values, as far as the rules let it."""

    def __init__(self, update: bool = True):
        self.keying = Keying()
        self.update = update
        self._nodes: dict[str, int] = {}
        self._keys: dict[int, Any] = {}
        self._schedule = KeySchedule()

    def operand(self, text: str) -> tuple[Operand, jax.Array]:
        """An operand by its description, and values for it, distinct and in (0, 1) or (-1, 1)."""
        letters, _, parity = text.partition(":")
        axes = []
        for letter in letters:
            if letter not in self._nodes:
                self._nodes[letter] = self.keying.node(SIZES[letter])
            node = self._nodes[letter]
            if letter == ".":
                self.keying.strip_key(node)
            if letter.isupper():
                self.keying.mark_batch(node)
            form = self.keying.leaf((SIZES[letter],))[0].parity if parity == "?" else ONE
            axes.append(Axis(node, 0 if parity == "0" else form))
        values = uniform(len(letters) + ord(letters[0]), *(SIZES[letter] for letter in letters))
        return Operand(tuple(axes)), jnp.abs(values) if parity == "0" else values

    def apply(self, function: Callable[..., Any], *texts: str) -> None:
        """Checks that a function commutes with the blinding.

        Raises:
          NotEquivariantError: the rules do not accept it.
        """
        operands, values = zip(*map(self.operand, texts), strict=True)
        jaxpr = flat_jaxpr(function, *values)
        known: dict[Any, Operand] = dict(zip(jaxpr.invars, operands, strict=True))
        for number, eqn in enumerate(jaxpr.eqns):
            inputs = [self._read(known, v) for v in eqn.invars]
            constant = not any(o.blinded for o in inputs)
            axes = commute(Context(self.keying, number, self.update or constant), eqn, inputs)
            zero = is_zero(eqn, inputs)
            known[eqn.outvars[0]] = Operand(axes, zero, blinded=not constant)
        pivots, contradictions = self.keying.solve()
        if contradictions:
            raise NotEquivariantError(contradictions[0].reason)
        self._check(jaxpr, operands, values, known[jaxpr.outvars[0]], pivots)

    @staticmethod
    def _read(known: dict[Any, Operand], v: Any) -> Operand:
        if isinstance(v, types.Literal):
            return Operand((), zero=not np.any(v.val), blinded=False)
        return known[v]

    def _check(self, jaxpr: Any, operands: Any, values: Any, result: Operand, pivots: Any) -> None:
        blinded = [self._blind(o, x, pivots) for o, x in zip(operands, values, strict=True)]
        (actual,) = _evaluate(jaxpr, blinded)
        (expected,) = _evaluate(jaxpr, values)
        layout = self._layout(result, pivots)
        restored = SIGNED_PERMUTATION.unblind(np.asarray(actual), layout, self._keys, None)
        np.testing.assert_allclose(restored, expected, rtol=1e-12, atol=1e-12)

    def _blind(self, operand: Operand, x: jax.Array, pivots: Any) -> jax.Array:
        layout = self._layout(operand, pivots)
        blinded, _ = blind(SIGNED_PERMUTATION, x, layout, self._keys, array_type(x))
        return jnp.asarray(blinded)

    def _layout(self, operand: Operand, pivots: Any) -> Layout:
        classes, parities = [], []
        for node, parity in operand.axes:
            number = None
            if node is not None and self.keying.keyed(node):
                number = self.keying.find(node)
            classes.append(number)
            has_parity = self.keying.has_parity(node)
            parities.append(resolve_parity(parity, pivots) if has_parity else 0)
            if number is not None and number not in self._keys:
                key_class = KeyClass(self.keying.size(number), self.keying.batch(number))
                stream = self._schedule.stream("test", number)
                self._keys[number] = SIGNED_PERMUTATION.draw(key_class, stream)
        return Layout(tuple(classes), tuple(parities))


def flat_jaxpr(function: Callable[..., Any], *values: Any) -> Any:
    """A function's equations, with calls inlined as the planner does."""
    closed: Any = jax.make_jaxpr(function)(*values)
    return flatten.flatten(closed, flatten.Flattening(lambda _: False, [])).jaxpr


def _evaluate(jaxpr: Any, values: Any) -> list[Any]:
    env = dict(zip(jaxpr.invars, values, strict=True))
    return equations.evaluate(jaxpr.eqns, env, jaxpr.outvars)


def product(lhs: str, rhs: str, out: str) -> Callable[..., Any]:
    """A `dot_general` by letters: those missing in `out` are contracted."""
    contracted = [a for a in lhs if a in rhs and a not in out]
    batch = [a for a in lhs if a in rhs and a in out]

    def axes(letters: list[str]) -> tuple[list[int], list[int]]:
        return [lhs.index(a) for a in letters], [rhs.index(a) for a in letters]

    numbers = axes(contracted), axes(batch)
    return lambda x, y: lax.dot_general(x, y, numbers)


def convolution(**options: Any) -> Callable[..., Any]:
    """A convolution of ``(batch, space, feature)`` with ``(space, in, out)``."""
    return lambda x, w: lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), **options
    )


def grouped(x: jax.Array, w: jax.Array) -> jax.Array:
    return convolution(feature_group_count=2)(x, w[:, :2])


def batch_grouped(x: jax.Array, w: jax.Array) -> jax.Array:
    numbers = ("CHN", "HIO", "NHC")
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, batch_group_count=2
    )


def pad_with_ones(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1)), constant_values=1)


def bind(primitive: Any, **params: Any) -> Callable[..., Any]:
    """A function that is one equation."""
    return lambda *operands: primitive.bind(*operands, **params)


ODD = [
    lax.sign, lax.tanh, lax.sinh, lax.asinh, lax.sin, lax.tan, lax.asin, lax.atan, lax.atanh,
    lax.cbrt, lax.erf, lax.erf_inv,
]  # fmt: skip
EVEN = [lax.abs, lax.square, lax.is_finite, lax.cosh]
OF_UNSIGNED = [
    lax.sqrt, lax.rsqrt, lax.exp, lax.exp2, lax.expm1, lax.log, lax.log1p, lax.logistic, lax.floor,
    lax.ceil, lax.round, lax.cos,
]  # fmt: skip
COMPARISONS = [lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge]
LOGIC = [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor]

# (what it is, function, operands)
Example = tuple[str, Callable[..., Any], tuple[str, ...]]
LINEAR: list[Example] = [
    ("neg", lax.neg, ("ab",)),
    ("copy", bind(prims.copy_p), ("ab",)),
    ("cheap", primitives.cheap_p.bind, ("ab",)),
    ("barrier", lax.optimization_barrier, ("ab",)),
    ("reduce_precision", lambda x: lax.reduce_precision(x, 8, 23), ("ab",)),
    ("add", lax.add, ("ab", "ab")),
    ("sub", lax.sub, ("ab", "ab")),
    ("add_any", bind(prims.add_jaxvals_p), ("ab", "ab")),
    ("add a zero", lambda x: x + jnp.zeros((6, 5)), ("ab",)),
    ("add without keys", lax.add, ("..", "..")),
    ("mul by a number", lambda x: x * 3.0, ("ab",)),
    ("mul by a constant", lambda x: x * jnp.full((6, 5), 3.0), ("ab",)),
    ("div by a number", lambda x: x / 3.0, ("ab",)),
    ("convert", lambda x: x.astype(jnp.float32).astype(float), ("ab",)),
    ("transpose", lambda x: x.transpose(2, 0, 1), ("abc",)),
    ("squeeze", lambda x: lax.squeeze(x[None], (0,)), ("ab",)),
    ("broadcast", lambda x: lax.broadcast_in_dim(x, (3, 6, 7, 5), (1, 3)), ("ab",)),
    ("reshape between keyed axes", lambda x: x.reshape(6, 2, 2, 1, 5), ("a.b",)),
    ("reshape adds and removes ones", lambda x: x[:, None].reshape(6, 5, 1), ("ab",)),
    ("reshape merges unkeyed axes", lambda x: x.reshape(16, 6), ("..a",)),
    ("rev", lambda x: x[:, ::-1], ("a.b",)),
    ("concatenate", lambda x, y: lax.concatenate([x, y], 1), ("a.", "a.")),
    ("concatenate with zeros", lambda x: lax.concatenate([x, jnp.zeros((6, 3))], 1), ("a.",)),
    ("slice", lambda x: x[:, 1:3], ("a.",)),
    ("pad with zeros", lambda x: jnp.pad(x, ((0, 0), (1, 2))), ("a.",)),
    ("product", product("ab", "bc", "ac"), ("ab", "bc")),
    ("product of transposed", product("ba", "cb", "ac"), ("ba", "cb")),
    ("product over two axes", product("abc", "bcd", "ad"), ("abc", "bcd")),
    ("product with batch", product("Abc", "Acd", "Abd"), ("abc", "acd")),
    ("product with a constant", lambda x: x @ jnp.ones((5, 2)), ("aB",)),
    ("outer product with a constant", lambda x: jnp.tensordot(x, jnp.ones(2), 0), ("ab",)),
    ("product of squares", product("ab", "bc", "ac"), ("ab:0", "bc:0")),
    ("convolution", convolution(), ("a.b", ".bc")),
    ("grouped convolution", grouped, ("a..", "...")),
    ("batch-grouped convolution", batch_grouped, ("b..", ".b.")),
]
UPDATES: list[Example] = [
    *((f.__name__, f, ("ab",)) for f in (*ODD, *EVEN)),
    *((f.__name__, f, ("ab:0",)) for f in (*OF_UNSIGNED, *EVEN)),
    *((f.__name__, f, ("ab:0", "ab:0")) for f in COMPARISONS),
    *((f.__name__, lambda x, y, f=f: f(x > 0.5, y > 0.5), ("ab:0",) * 2) for f in LOGIC),
    ("not", lambda x: ~(x > 0.5), ("ab:0",)),
    ("pow", lambda x: x**0.3, ("ab:0",)),
    ("rem", lambda x: lax.rem(x, 0.3), ("ab:0",)),
    ("max", lax.max, ("ab:0", "ab:0")),
    ("min", lax.min, ("ab:0", "ab:0")),
    ("clamp", lambda x: lax.clamp(0.2, x, 0.6), ("ab:0",)),
    ("odd power", lambda x: x**3, ("ab",)),
    ("even power", lambda x: x**4 + jnp.abs(x), ("ab",)),
    ("mul", lax.mul, ("ab", "ab")),
    ("mul by a square", lax.mul, ("ab", "ab:0")),
    ("mul by a column", lambda x, y: x * y[:, None], ("ab", "a:0")),
    ("div", lambda m, v: m / (jnp.sqrt(v) + 1e-8), ("ab", "ab:0")),
    ("Adam with moments", lambda g, m, v: (m + g) / jnp.sqrt(v + g**2), ("ab", "ab:?", "ab:?")),
    ("comparison as number", lambda x: (x > 0.5).astype(float), ("ab:0",)),
    ("select", lambda x, y: jnp.where(y > 0.5, x, -x), ("ab", "ab:0")),
    ("select or zero", lambda x, y: jnp.where(y > 0.5, x, 0.0), ("ab", "ab:0")),
    ("sum of squares", lambda x: jnp.sum(x**2), ("ab",)),
    ("row sums of squares", lambda x: jnp.sum(x**2, axis=1), ("ab",)),
    ("sum over an axis without signs", lambda x: jnp.sum(x, axis=0), ("Ab",)),
    ("sum over an axis without key", lambda x: jnp.sum(x, axis=1), ("a.b",)),
    ("reduce_max", lambda x: jnp.max(x, axis=0), ("ab:0",)),
    ("reduce_min", lambda x: jnp.min(jnp.abs(x)), ("ab",)),
    ("reduce_and", lambda x: jnp.all(x > 0.1, axis=1), ("ab:0",)),
    ("reduce_or", lambda x: jnp.any(x > 0.9), ("ab:0",)),
    ("pad squares with ones", pad_with_ones, ("a.:0",)),
    ("Newton-Schulz", lambda x: 1.5 * x - 0.5 * (x @ x.T) @ x, ("ab",)),
    ("two classes become one", lax.add, ("ab", "db")),
]


@pytest.mark.parametrize(("what", "function", "texts"), LINEAR, ids=[e[0] for e in LINEAR])
def test_linear_rules_hold_outside_updates(what, function, texts):
    Harness(update=False).apply(function, *texts)


@pytest.mark.parametrize(("what", "function", "texts"), UPDATES, ids=[e[0] for e in UPDATES])
def test_update_rules_hold(what, function, texts):
    Harness().apply(function, *texts)


def test_every_rule_is_tested():
    tested = set()
    for _, function, texts in LINEAR + UPDATES:
        values = [Harness().operand(text)[1] for text in texts]
        tested |= {eqn.primitive for eqn in flat_jaxpr(function, *values).eqns}
    assert {p.name for p in rules._RULES} <= {p.name for p in tested}


REFUSED: list[tuple[str, Callable[..., Any], tuple[str, ...], str]] = [
    ("exp of a signed value", lax.exp, ("ab",), "exp is not an odd function"),
    ("square root of a leaf and its sign", lambda x: jnp.sqrt(x) + x**3, ("ab",), "sqrt"),
    ("add a constant", lambda x: x + 1.0, ("ab",), "add mixes .* signs or polarities differ"),
    ("add a square", lambda x: x + x**2, ("ab",), "add mixes .* signs or polarities differ"),
    ("relu", lambda x: lax.max(x, 0.0), ("ab",), "max is not an odd function"),
    ("clip", lambda x: lax.clamp(-1.0, x, 1.0), ("ab",), "clamp is not an odd function"),
    ("sum over a signed axis", lambda x: jnp.sum(x, axis=0), ("ab",), "reduce_sum adds up"),
    ("max over a signed axis", lambda x: jnp.max(x), ("ab",), "reduce_max compares"),
    ("mean away from a sum", lambda x: x - x.mean(0), ("ab",), "reduce_sum adds up"),
    ("reshape that merges keyed axes", lambda x: x.reshape(30), ("ab",), "merges or splits"),
    ("reshape that splits a keyed axis", lambda x: x.reshape(2, 3, 5), ("ab",), "merges or splits"),
    ("reshape with a keyed and an unkeyed axis", lambda x: x.reshape(24), ("a.",), "merges"),
    ("slice along a keyed axis", lambda x: x[1:3], ("ab",), "slice along a keyed axis"),
    ("strided slice", lambda x: x[:, ::2], ("ab",), "slice along a keyed axis"),
    ("rev along a keyed axis", lambda x: x[::-1], ("ab",), "rev along a keyed axis"),
    ("pad along a keyed axis", lambda x: jnp.pad(x, 1), ("ab",), "pad along a keyed axis"),
    ("concatenate along one", lambda x, y: lax.concatenate([x, y], 0), ("ab", "ab"), "along"),
    ("pad a signed value", pad_with_ones, ("a.",), "other than zero"),
    ("cumsum", lambda x: jnp.cumsum(x, 0), ("ab",), "cumsum has no rule"),
    ("sort", lambda x: lax.sort(x), ("ab",), "sort has no rule"),
    ("argmax", lambda x: jnp.argmax(x, 0), ("ab",), "argmax has no rule"),
    ("gather", lambda x: jnp.take(x, jnp.arange(3), 0), ("ab",), "has no rule"),
    ("iota", lambda x: x * lax.broadcasted_iota(float, (6, 5), 0), ("ab",), "iota has no rule"),
    ("round to an integer", lambda x: x.astype(int), ("ab",), "convert_element_type is not an odd"),
    ("select by sign", lambda x: jnp.where(x > 0, x, 0.0), ("ab",), "gt is not an odd function"),
    ("select a constant", lambda x, y: jnp.where(y > 0, x, 1.0), ("ab", "ab:0"), "select_n mixes"),
    ("product of gradient and square", product("ab", "bc", "ac"), ("ab", "bc:0"), "contracts"),
    ("sum as a product", lambda x: x @ jnp.ones(5), ("ab",), "dot_general sums along a signed"),
    ("convolution of squares", convolution(), ("a.b", ".bc:0"), "contracts a signed axis"),
    ("several results", lambda x: lax.top_k(x, 2)[0], ("ab",), "has no rule"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "function", "texts", "reason"), REFUSED, ids=[e[0] for e in REFUSED]
)
def test_refusals(what, function, texts, reason):
    with pytest.raises(NotEquivariantError, match=reason):
        Harness().apply(function, *texts)


@pytest.mark.parametrize(
    ("function", "texts", "reason"),
    [
        (lax.tanh, ("ab",), "tanh is not linear"),
        (lax.square, ("ab",), "square is not linear"),
        (lax.mul, ("ab", "ab"), "mul is not linear"),
        (lambda x: 1 / x, ("ab",), "div is not linear"),
        (lambda x: x**3, ("ab",), "integer_pow is not linear"),
        (lax.sqrt, ("ab:0",), "sqrt is not linear"),
        (lambda x: jnp.sum(x, 1), ("a.",), "reduce_sum is not linear"),
        (lambda x, y: jnp.where(y > 0, x, -x), ("ab", "ab:0"), "is not linear"),
        (lax.add, ("ab", "db"), "add combines values under different keys"),
        (lax.add, ("a.", "ae"), "under different keys"),
    ],
)
def test_refusals_outside_updates(function, texts, reason):
    with pytest.raises(NotEquivariantError, match=reason):
        Harness(update=False).apply(function, *texts)


def test_a_wrong_rule_would_be_noticed(monkeypatch):
    monkeypatch.setitem(rules._RULES, prims.exp_p, rules._odd_function)
    with pytest.raises(AssertionError):
        Harness().apply(lax.exp, "ab")


def test_batch_axes_lose_their_signs():
    harness = Harness(update=False)
    harness.apply(product("Abc", "Acd", "Abd"), "abc", "acd")
    assert harness.keying.keyed(0) and not harness.keying.has_parity(0)


def test_convolution_keys_are_on_batch_and_features():
    harness = Harness(update=False)
    (lhs, x), (rhs, w) = harness.operand("abc"), harness.operand("dce")
    (eqn,) = flat_jaxpr(convolution(), x, w).eqns
    out = commute(Context(harness.keying, 0, False), eqn, [lhs, rhs])
    keyed = [harness.keying.keyed(axis.node) for axis in (*lhs.axes, *rhs.axes, *out)]
    assert keyed == [True, False, True, False, True, True, True, False, True]


# Keying


def test_classes_join_and_lose_keys_together():
    keying = Keying()
    a, b, c = keying.node(4), keying.node(4), keying.node(4)
    keying.join(a, b)
    keying.mark_batch(b)
    assert keying.same(a, b) and not keying.same(a, c)
    assert keying.keyed(a) and keying.batch(a) and not keying.has_parity(a)
    keying.strip_key(c)
    keying.join(c, a)
    assert not keying.keyed(b)


def test_short_axes_carry_no_key():
    keying = Keying()
    assert not keying.keyed(keying.node(0)) and not keying.keyed(keying.node(1))
    assert keying.keyed(keying.node(2)) and not keying.keyed(None)


def test_axes_of_different_sizes_never_join():
    keying = Keying()
    with pytest.raises(AssertionError, match="different sizes"):
        keying.join(keying.node(2), keying.node(3))


@hypothesis.given(st.lists(st.integers(0, 2**5 - 1), max_size=8))
def test_demands_are_solved_over_gf2(forms):
    """Bit 0 of a form is the constant, the others are four unknowns."""
    keying = Keying()
    node = keying.node(2)
    for number, form in enumerate(forms):
        keying.demand(form, node, number, "")
    pivots, contradictions = keying.solve()

    def vanishes(form: int, unknowns: int) -> bool:
        return (form & (1 + 2 * unknowns)).bit_count() % 2 == 0

    def solvable(count: int) -> bool:
        return any(all(vanishes(f, u) for f in forms[:count]) for u in range(16))

    first = next((n for n in range(len(forms)) if not solvable(n + 1)), None)
    assert [demand.equation for demand in contradictions] == ([] if first is None else [first])
    if not contradictions:
        assert all(reduce_form(form, pivots) == 0 for form in forms)
        parities = [resolve_parity(1 << bit, pivots) for bit in range(1, 5)]
        chosen = sum(parity << bit for bit, parity in enumerate(parities))
        assert all(vanishes(form, chosen) for form in forms)


def test_demands_on_axes_without_signs_are_void():
    keying = Keying()
    node = keying.node(3)
    keying.demand(ONE, node, 0, "a contradiction")
    assert keying.solve()[1]
    keying.mark_batch(node)
    assert not keying.solve()[1]
