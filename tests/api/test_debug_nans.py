"""`shield(debug_nans=True)`: one bit a call, and the equation that made a NaN."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from tempo_jax.errors import NanError, UnsupportedError
from tempo_jax.schemes import Mixing, SignedPermutation
from tests.support.fresh import run_fresh

ROWS, WIDTH = 256, 64


def step(state, x, *, forward, rate=0.1):
    """A gradient step whose forward or backward pass makes a NaN of a zero."""

    def loss_of(w):
        h = jax.nn.gelu(x @ w)
        total = jnp.sum(h**2)
        if forward:
            return total + forward_fault(state["zero"])
        return total + backward_fault(state["zero"] * jnp.sum(w))

    loss, gradient = jax.value_and_grad(loss_of)(state["w"])
    return {"w": state["w"] - rate * gradient, "zero": state["zero"]}, tempo.reveal(loss)


@jax.jit
def forward_fault(x):
    return jnp.log(x - 1.0)


@jax.jit
def backward_fault(x):
    return jnp.sqrt(x * x)


def named_as_the_users_line() -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32)
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), SignedPermutation()):
            faults: list[Any] = [
                (True, forward_fault, r"`log` at {}:{}[^,]* made first"),
                (False, backward_fault, r"`\w+` at {}:{}[^,]*, in the backward pass made first"),
            ]
            for forward, fault, what in faults:
                plain = functools.partial(step, forward=forward)
                shielded = tempo.shield(
                    plain, enclave=enclave, scheme=scheme, offload="all", debug_nans=True
                )
                good = enclave.seal({"w": w, "zero": jnp.float32(2.0)})
                for _ in range(2):
                    state, loss = shielded(good, x)
                    expected, plain_loss = jax.jit(plain)({"w": w, "zero": jnp.float32(2.0)}, x)
                    np.testing.assert_allclose(loss, plain_loss, rtol=1e-3)
                    np.testing.assert_allclose(
                        enclave.open(state)["w"], expected["w"], rtol=1e-2, atol=1e-3
                    )
                bad = enclave.seal({"w": w, "zero": jnp.float32(0.0)})
                line = fault.__wrapped__.__code__.co_firstlineno + 2
                with pytest.raises(NanError, match=what.format(__file__, line)) as caught:
                    shielded(bad, x)
                assert isinstance(caught.value, FloatingPointError)
                # What was passed in is as it was.
                np.testing.assert_array_equal(enclave.open(bad)["w"], w)


def test_the_equation_is_named():
    run_fresh(named_as_the_users_line, optimized=False)


def test_a_sealed_result_is_looked_at_without_being_shown(enclave):
    shielded = tempo.shield(lambda x: {"y": x / x}, enclave=enclave, debug_nans=True)
    np.testing.assert_array_equal(enclave.open(shielded(jnp.ones(3)))["y"], 1)
    with pytest.raises(NanError, match="`div` at .* made first"):
        shielded(jnp.zeros(3))


def test_an_argument_that_has_one_is_told(enclave):
    shielded = tempo.shield(lambda x, n: x + n, enclave=enclave, debug_nans=True, static_argnums=1)
    assert enclave.open(shielded(1.0, 2)) == 3
    with pytest.raises(NanError, match="which an argument has as well"):
        shielded(np.nan, 2)


def test_where_nothing_can_be_raised_it_is_refused(enclave):
    shielded = tempo.shield(lambda x: x, enclave=enclave, debug_nans=True)
    with pytest.raises(UnsupportedError, match="can raise nothing"):
        jax.jit(shielded)(enclave.seal(1.0))
    # Inside another shielded function it is part of that.
    outer = tempo.shield(lambda x: tempo.reveal(shielded(x) + 1), enclave=enclave)
    assert outer(1.0) == 2
    with pytest.raises(UnsupportedError, match="debug_nans is"):
        wrong: Any = 3
        tempo.shield(lambda x: x, enclave=enclave, debug_nans=wrong)
