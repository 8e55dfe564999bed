"""What becomes of equations that are no compiled program of XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import mlir

import tempo_jax as tempo
from tempo_jax.errors import UnsupportedError
from tests.support.steps import uniform

X = uniform(1, 8, 12)


def _foreign(x):
    return jax.ffi.ffi_call("somebodys_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


hidden_p = jex_core.Primitive("hidden_callback")
hidden_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(
    hidden_p,
    mlir.lower_fun(lambda x: jax.pure_callback(np.sin, x, x), multiple_results=False),
)


@pytest.mark.parametrize(
    "function",
    [_foreign, lambda x: lax.cond(x[0, 0] > 0, _foreign, lambda y: y, x)],
    ids=["at the top", "within control flow"],
)
def test_unknown_custom_call_is_refused_with_its_line(enclave, function):
    shielded = tempo.shield(lambda x: function(x @ x.T), enclave=enclave)
    with pytest.raises(UnsupportedError, match=r"`ffi_call` at .*test_export.*`somebodys_kernel`"):
        shielded(X)


def test_callback_that_a_lowering_makes_is_refused_with_its_line(enclave):
    shielded = tempo.shield(lambda x: jnp.sum(hidden_p.bind(x @ x.T)), enclave=enclave)
    with pytest.raises(UnsupportedError, match=r"`hidden_callback` at .*test_export.*into Python"):
        shielded(X)
