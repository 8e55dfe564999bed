"""Calls from compiled programs into Python, under settings that only one thread has."""

import jax
import jax.numpy as jnp
import numpy as np

import tempo_jax as tempo
from tempo_jax.jaxprs.callbacks import call
from tests.support.fresh import run_fresh


def wide_results_come_back() -> None:
    """float32 is the default, and the program's thread has `enable_x64` to itself."""
    x = np.linspace(0, 1, 1 << 16)
    made = {
        "float64": x,
        "int64": np.arange(1 << 40, (1 << 40) + 7),
        "uint64": np.array(2**64 - 1, np.uint64),
        "complex128": (x + 1j * x[::-1]).reshape(256, 256),
        "complex64": x.astype(np.complex64),
        "float32": x.astype(np.float32),
        "bool": x > 0.5,
    }
    types = [jax.ShapeDtypeStruct(value.shape, name) for name, value in made.items()]
    with jax.enable_x64(True):
        returned = jax.jit(lambda: call(lambda: list(made.values()), types))()
        for (name, value), result in zip(made.items(), returned, strict=True):
            assert result.dtype == name
            np.testing.assert_array_equal(result, value)


def steps_in_float64() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((512, 256)), rng.standard_normal((2, 256, 256)) / 16

    def step(w, x):
        loss, gradient = jax.value_and_grad(lambda w: jnp.mean((jnp.tanh(x @ w[0]) @ w[1]) ** 2))(w)
        return w - 0.1 * gradient, tempo.reveal(loss)

    with tempo.Enclave.launch() as enclave, jax.enable_x64(True):
        for scheme in (tempo.schemes.Mixing(), tempo.schemes.SignedPermutation()):
            shielded = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
            new, loss = shielded(enclave.seal(w), x)
            plain, expected = jax.jit(step)(w, x)
            np.testing.assert_allclose(loss, expected, rtol=1e-10)
            opened = enclave.open(new)
            assert opened.dtype == np.float64
            np.testing.assert_allclose(opened, plain, rtol=1e-10, atol=1e-10)
        # And what is called from the user's own program.
        new, loss = jax.jit(shielded)(*enclave.seal((w, x)))
        np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_results_of_64_bits_under_a_setting_of_one_thread():
    run_fresh(wide_results_come_back, steps_in_float64)
