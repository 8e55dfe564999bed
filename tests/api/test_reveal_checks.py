"""`shield(reveal_checks=True)`: a failed check of Equinox raises its message, and no value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify

import tempo_jax as tempo
from tempo_jax.errors import CheckError, TempoError, UnsupportedError
from tempo_jax.schemes import Mixing, SignedPermutation
from tests.support.cases import W, X
from tests.support.checks import equinox, like_equinox
from tests.support.fresh import run_fresh
from tests.support.steps import assert_close, shield_all
from tests.support.workers import mesh_of

ROWS, WIDTH = 256, 64


def train_step(state: Any, x: jax.Array, check: Any = like_equinox) -> Any:
    """A gradient step with a check of the batch, one in a loop's body and one of the loss."""

    def loss_of(w: jax.Array) -> jax.Array:
        def body(h: jax.Array, _: None) -> Any:
            return check(jnp.tanh(h @ w), h.max() > 30, "a layer is too large"), None

        h, _ = lax.scan(body, check(x, jnp.abs(x).max() > 100, "the batch is too large"), length=2)
        loss = jnp.square(h).mean()
        return check(loss, loss <= 0, "the loss is not positive")

    loss, gradient = jax.value_and_grad(loss_of)(state["w"])
    return {"w": state["w"] - 0.1 * gradient}, tempo.reveal(loss)


def batches() -> Any:
    """A state, a batch, and batches that fail a check, with its message."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-1, 1, (ROWS, WIDTH)), jnp.float32)
    w = jnp.asarray(rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)), jnp.float32)
    failing = [
        (1e3 * x, "the batch is too large"),
        (50 * x, "a layer is too large"),
        (0 * x, "the loss is not positive"),
    ]
    return {"w": w}, x, failing


def raised_as_the_users_line() -> None:
    start, x, failing = batches()
    expected = jax.jit(train_step)(start, x)
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), SignedPermutation()):
            shielded = tempo.shield(
                train_step, enclave=enclave, scheme=scheme, offload="all", reveal_checks=True
            )
            state = enclave.seal(start)
            for batch, message in failing:
                with pytest.raises(CheckError, match=f"'{message}'") as caught:
                    shielded(state, batch)
                assert isinstance(caught.value, (TempoError, RuntimeError))
                assert "jit" not in str(caught.value)
            # Nothing was committed, so that the state is still there to go on from.
            state, loss = shielded(state, x)
            np.testing.assert_allclose(loss, expected[1], rtol=1e-4)
            np.testing.assert_allclose(
                enclave.open(state)["w"], expected[0]["w"], rtol=1e-2, atol=1e-4
            )


def raised_inside_jit() -> None:
    start, x, failing = batches()
    with tempo.Enclave.launch() as enclave:
        for mesh in (None, mesh_of(2)):
            shielded = tempo.shield(
                train_step,
                enclave=enclave,
                scheme=SignedPermutation(),
                offload="all",
                mesh=mesh,
                reveal_checks=True,
            )
            compiled, state = jax.jit(shielded), enclave.seal(start)
            for batch, message in failing:
                sealed = enclave.seal(batch)
                with pytest.raises(CheckError, match=f"'{message}'"):
                    shielded(state, batch)
                with pytest.raises(jax.errors.JaxRuntimeError):
                    jax.block_until_ready(compiled(state, sealed)[1])
                with pytest.raises(CheckError, match=message), tempo.errors.original_errors():
                    jax.block_until_ready(compiled(state, sealed)[1])
            state, loss = compiled(state, enclave.seal(x))
            np.testing.assert_allclose(loss, jax.jit(train_step)(start, x)[1], rtol=1e-4)
            np.testing.assert_array_less(0, np.abs(enclave.open(state)["w"]).max())


def test_a_failed_check_raises_its_message():
    run_fresh(raised_as_the_users_line, optimized=False)


def test_a_failed_check_inside_jit_and_on_a_mesh():
    run_fresh(raised_inside_jit, devices=2, optimized=False)


def everywhere(check: Any) -> Any:
    """Checks in a `cond`, in a `while` and its condition, and under `vmap`."""

    def function(x: jax.Array, w: jax.Array, which: jax.Array) -> Any:
        def branch(x: jax.Array) -> jax.Array:
            return check(x, which == 1, "in the branch") @ w

        def more(c: Any) -> jax.Array:
            return check(c[0] * 1.0, (which == 2) & (c[0] == 2), "in the condition") < 3

        def body(c: Any) -> Any:
            return c[0] + 1, check(c[1] / 2, (which == 3) & (c[0] == 1), "in the loop")

        y = lax.cond(which > 0, branch, lambda x: x @ w, x)
        _, y = lax.while_loop(more, body, (0, y))
        rows = jax.vmap(lambda r: check(r, which == 4, "in a row"))(y)
        count = check(which, which == 5, "of an integer")
        return tempo.reveal(rows), count

    return function


@pytest.mark.parametrize("check", [like_equinox, equinox])
def test_checks_are_found_wherever_they_stand(enclave, check):
    plain = everywhere(check)
    shielded = shield_all(plain, enclave=enclave, donate=False, reveal_checks=True)
    assert_close(shielded(X, W, 0)[0], jax.jit(plain)(X, W, 0)[0])
    messages = ["in the branch", "in the condition", "in the loop", "in a row", "of an integer"]
    for number, message in enumerate(messages, start=1):
        with pytest.raises(CheckError, match=f"support/checks.py:.*'{message}'"):
            shielded(X, W, number)
    assert "each call reveals which of" in str(shielded.explain(X, W, 0))


def test_several_checks_say_which_failed_first(enclave):
    def function(x):
        return like_equinox(like_equinox(x, x[0] > 0, "first"), x[1] > 0, "second")

    shielded = tempo.shield(function, enclave=enclave, reveal_checks=True)
    with pytest.raises(CheckError, match="first"):
        shielded(jnp.ones(2))
    with pytest.raises(CheckError, match="second"):
        shielded(jnp.array([-1.0, 1.0]))
    assert_close(enclave.open(shielded(-jnp.ones(2))), -jnp.ones(2))


def test_without_the_option_nothing_is_revealed(enclave):
    def function(x):
        return like_equinox(x, x[0] > 0, "too large")

    shielded = tempo.shield(function, enclave=enclave)
    assert np.isnan(enclave.open(shielded(jnp.ones(2)))).all()
    assert not shielded.explain(jnp.ones(2)).plan.revealed
    # With it, and without a check, neither.
    shielded = tempo.shield(lambda x: 2 * x, enclave=enclave, reveal_checks=True)
    assert not shielded.explain(jnp.ones(2)).plan.revealed
    with pytest.raises(UnsupportedError, match="reveal_checks is"):
        wrong: Any = 3
        tempo.shield(function, enclave=enclave, reveal_checks=wrong)


def test_under_vmap_and_eval_shape(enclave):
    def function(x):
        return tempo.reveal(2 * equinox(x, x.max() > 0, "too large"))

    shielded = tempo.shield(function, enclave=enclave, reveal_checks=True)
    assert jax.eval_shape(shielded, enclave.seal(jnp.ones(2))).shape == (2,)
    assert_close(jax.vmap(shielded)(-jnp.ones((3, 2))), -2 * jnp.ones((3, 2)))
    with pytest.raises(CheckError, match="too large"):
        jax.vmap(shielded)(jnp.array([[-1.0], [1.0]]))


def test_what_checkify_finds_is_revealed_by_the_program_itself(enclave):
    def function(x):
        checkify.check(x[0] < 0, "too large")
        return 2 * x

    def checked(x):
        error, y = checkify.checkify(function)(x)
        return tempo.reveal(error), y

    shielded = tempo.shield(checked, enclave=enclave)
    error, y = shielded(-jnp.ones(2))
    error.throw()
    assert_close(enclave.open(y), -2 * jnp.ones(2))
    with pytest.raises(checkify.JaxRuntimeError, match="too large"):
        shielded(jnp.ones(2))[0].throw()
