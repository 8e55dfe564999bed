"""Callbacks without results are left out, and checks that would raise give NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.extend import core as jex_core
from jax.interpreters import mlir

import tempo_jax as tempo
from tests.support.cases import S, W, X
from tests.support.checks import equinox, like_equinox
from tests.support.steps import assert_close, shield_all


@pytest.mark.parametrize("ordered", [False, True])
def test_io_callbacks_without_results_are_left_out_like_debugging(enclave, ordered):
    seen = []

    def show(c):
        io_callback(lambda value: seen.append(value), None, c.sum(), ordered=ordered)

    def function(x, w):
        def body(c, _):
            show(c)
            return jnp.tanh(c), c.sum()

        show(x)
        return lax.scan(body, x @ w, length=3)

    shielded = shield_all(function, enclave=enclave, donate=False)
    result = enclave.open(shielded(X, W))
    jax.effects_barrier()
    assert not seen
    assert str(shielded.explain(X, W)).count("`io_callback` at") == 2
    assert_close(result, jax.jit(function)(X, W))


@pytest.mark.parametrize("check", [like_equinox, equinox])
def test_failed_checks_give_nan_and_others_nothing(enclave, check):
    def function(x, w):
        def body(c, _):
            return check((jnp.tanh(c[0]), c[1] + 1), jnp.abs(c[0]).max() > 50), None

        start = check(x @ w, jnp.abs(x).max() > 100)
        return start, lax.scan(body, (start, 0), length=100)[0]

    shielded = shield_all(function, enclave=enclave, donate=False)
    assert_close(enclave.open(shielded(X, W)), jax.jit(function)(X, W))
    assert "become NaN" in str(shielded.explain(X, W))
    first, (last, _) = enclave.open(shielded(1e3 * X, W))
    assert np.isnan(first).all() and np.isnan(last).all()
    # A failure within the loop alone.
    first, (last, _) = enclave.open(shielded(90 * X / jnp.abs(X).max(), W))
    assert np.isfinite(first).all() and np.isnan(last).all()


def _solved(x: Any, s: Any) -> Any:
    return linear_solve_p.bind(x, s)[0]


def _solve(x: Any, s: Any) -> list[Any]:
    return [jnp.linalg.solve(s, like_equinox(x, jnp.abs(x).max() > 100))]


_solve.__module__ = "lineax._solve"
linear_solve_p = jex_core.Primitive("linear_solve")
linear_solve_p.multiple_results = True
linear_solve_p.def_impl(_solve)
linear_solve_p.def_abstract_eval(lambda x, s: [x])
mlir.register_lowering(linear_solve_p, mlir.lower_fun(_solve, multiple_results=True))


def _lineax(x: Any, s: Any) -> Any:
    lineax = pytest.importorskip("lineax", reason="lineax is not installed")

    def loss(s: Any) -> Any:
        return lineax.linear_solve(lineax.MatrixLinearOperator(s), x[:, 0]).value.sum()

    return jax.grad(loss)(s)


@pytest.mark.parametrize("solve", [_solved, _lineax])
def test_checks_that_a_lowering_makes_are_computed_inside(enclave, solve):
    shielded = shield_all(solve, enclave=enclave, donate=False)
    assert_close(enclave.open(shielded(X, S)), jax.jit(solve)(X, S))


def test_check_that_could_not_show_its_failure_is_refused(enclave):
    shielded = tempo.shield(lambda x: like_equinox(jnp.int32(3), x[0, 0] > 1), enclave=enclave)
    with pytest.raises(tempo.errors.UnsupportedError, match="A check that raises may give NaN"):
        shielded(X)
