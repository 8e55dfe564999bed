"""Sealed values: opened as they were, shown to nobody, freed when dropped."""

import copy
import gc
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import tempo_jax as tempo
from tempo_jax.errors import SealedValueError, UnsupportedError
from tempo_jax.jaxprs.opaque import named_words
from tempo_jax.sealing.array import handle_array, handle_text
from tests.support.processes import SECONDS
from tests.support.steps import assert_close, comparable, shield_all, uniform

# Sealed values

VALUES: dict[str, Any] = {
    **{
        name: jnp.asarray([[0, 1, 2], [3, 100, 5]], name)
        for name in (
            *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
            *("complex64", "complex128"),
        )
    },
    "odd floats": jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 5e-324]),
    "scalar": jnp.float32(1.5),
    "Python float": 0.25,
    "Python int": -3,
    "Python bool": True,
    "Python complex": 1 - 2j,
    "NumPy array": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1],
    "NumPy scalar": np.float16(3),
    "empty": jnp.zeros((0,)),
    "empty matrix": jnp.zeros((3, 0, 2), jnp.int8),
    "typed key": jax.random.key(3),
    "typed keys": jax.random.split(jax.random.key(4), (2, 3)),
    "rbg key": jax.random.key(5, impl="rbg"),
    "no typed keys": jax.random.split(jax.random.key(4), 0),
    "legacy key": jax.random.PRNGKey(6),
}


@pytest.mark.parametrize("name", VALUES)
def test_opening_inverts_sealing(enclave, name):
    value = VALUES[name]
    sealed = enclave.seal(value)
    plain = jnp.asarray(value)
    assert isinstance(sealed, tempo.SealedArray) and sealed.form == "encrypted"
    assert (sealed.shape, sealed.dtype) == (plain.shape, plain.dtype)
    assert (sealed.ndim, sealed.size) == (plain.ndim, plain.size)
    assert_same_values(enclave.open(sealed), plain)


def test_values_pass_through_the_enclave(enclave):
    passed = tempo.shield(lambda values: values, enclave=enclave, donate=False)(VALUES)
    assert {leaf.form for leaf in jax.tree.leaves(passed, is_leaf=_is_sealed)} == {"resident"}
    opened = enclave.open(passed)
    for name, value in VALUES.items():
        assert_same_values(opened[name], jnp.asarray(value))
        assert passed[name].weak_type == jax.typeof(value).weak_type


def assert_same_values(actual: jax.Array, expected: jax.Array) -> None:
    """Equal shape, dtype and bits."""
    assert isinstance(actual, jax.Array)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert comparable(actual).tobytes() == comparable(expected).tobytes()


def test_weak_types_promote_as_they_do_without_shield(enclave):
    def scale(x, factor):
        return x * factor

    x, factor = jnp.ones(2, jnp.bfloat16), 0.5
    shielded = tempo.shield(scale, enclave=enclave, donate=False)
    assert enclave.open(shielded(x, enclave.seal(factor))).dtype == scale(x, factor).dtype


def test_big_endian_array_is_sealed_by_value_or_refused(enclave):
    foreign = np.arange(3, dtype=">f4")
    try:
        sealed = enclave.seal(foreign)
    except UnsupportedError:
        return
    np.testing.assert_array_equal(enclave.open(sealed), foreign)


def test_sealing_again_changes_nothing(enclave):
    sealed = enclave.seal({"a": jnp.ones(2)})
    assert enclave.seal(sealed)["a"] is sealed["a"]
    assert enclave.open({"a": 3, "b": "text"}) == {"a": 3, "b": "text"}


@pytest.mark.parametrize(
    "leaf", ["text", b"bytes", object(), np.array(["a"])], ids=lambda a: type(a).__name__
)
def test_sealing_what_is_no_array_is_refused(enclave, leaf):
    with pytest.raises(
        UnsupportedError, match="neither an array nor a number|dtype <U1, which JAX does not take"
    ):
        enclave.seal({"leaf": leaf})


def test_sealing_inside_jit_is_refused(enclave):
    with pytest.raises(UnsupportedError, match="outside jit"):
        jax.jit(lambda x: enclave.seal(x).content)(jnp.ones(2))


def _is_sealed(x: Any) -> bool:
    return isinstance(x, tempo.SealedArray)


@pytest.fixture(scope="module")
def three_forms(enclave) -> dict[str, tempo.SealedArray]:
    """A value of 12345s in every form a sealed value has."""

    def step(state, x):
        optimizer = tempo.cheap_update(optax.sgd(0.0))
        gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(state)
        return optax.apply_updates(state, optimizer.update(gradient, optimizer.init(state))[0])

    secret = jnp.full((3, 3), 12345.0)
    return {
        "encrypted": enclave.seal(secret),
        "resident": tempo.shield(lambda x: x, enclave=enclave)(secret),
        "blinded": shield_all(step, enclave=enclave)(secret, jnp.ones((3, 3))),
    }


@pytest.mark.parametrize("form", ["encrypted", "resident", "blinded"])
def test_sealed_array_shows_nothing(three_forms, form):
    sealed = three_forms[form]
    assert sealed.form == form
    assert repr(sealed) == str(sealed) == f"{sealed}" == f"SealedArray(float64[3,3], {form})"
    for convert in (np.asarray, np.array, jnp.asarray, jnp.sum, np.sum):
        with pytest.raises((SealedValueError, TypeError), match="SealedArray"):
            convert(sealed)
    for convert in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SealedValueError, match="not saved or pickled"):
            convert(sealed)
    for convert in (float, int, bool, iter, lambda s: s + 1, lambda s: s[0]):
        with pytest.raises((TypeError, SealedValueError)):
            convert(sealed)


@pytest.mark.parametrize("form", ["encrypted", "resident", "blinded"])
def test_sealed_array_is_a_pytree(enclave, three_forms, form):
    sealed = three_forms[form]
    children, structure = jax.tree.flatten(sealed)
    assert all(isinstance(c, (jax.Array, np.ndarray)) for c in children)
    again = jax.tree.unflatten(structure, children)
    assert repr(again) == repr(sealed) and jax.tree.structure(again) == structure
    np.testing.assert_array_equal(enclave.open(again), np.full((3, 3), 12345.0))


def test_altered_ciphertext_is_refused(enclave):
    sealed = enclave.seal(jnp.ones(3))
    (content, handle), structure = jax.tree.flatten(sealed)
    altered = jax.tree.unflatten(structure, [content.at[20].add(np.uint8(1)), handle])
    with pytest.raises(SealedValueError, match=r"float64\[3\] failed its authentication"):
        enclave.open(altered)
    with pytest.raises(SealedValueError):
        tempo.shield(lambda x: x, enclave=enclave)(altered)


def test_unknown_handle_is_refused(enclave):
    sealed = tempo.shield(lambda x: x, enclave=enclave)(jnp.ones(3))
    (handle,), structure = jax.tree.flatten(sealed)
    forged = jax.tree.unflatten(structure, [handle_array(handle_text(handle)[::-1])])
    with pytest.raises(SealedValueError, match="not in this enclave"):
        enclave.open(forged)


def test_two_sealings_of_a_value_differ(enclave):
    first, second = (np.asarray(enclave.seal(jnp.ones(3)).content) for _ in range(2))
    assert (first != second).any()


# In the states that Flax makes


class Model(nn.Module):
    """A dense layer with batch statistics."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (n, 3) to (n, 2)."""
        return nn.BatchNorm(use_running_average=False)(nn.Dense(2)(x))


def test_linen_variables_and_train_state(enclave):
    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((4, 3)))
    sealed = enclave.seal(variables)
    assert jax.tree.structure(sealed, is_leaf=_is_sealed) == jax.tree.structure(variables)
    assert_close(enclave.open(sealed), variables)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adam(1e-3))
    sealed = enclave.seal(state)
    assert isinstance(sealed, TrainState) and _is_sealed(sealed.step)
    assert all(map(_is_sealed, jax.tree.leaves(sealed, is_leaf=_is_sealed)))
    assert_close(enclave.open(sealed), jax.tree.map(jnp.asarray, state))


def test_nnx_state(enclave):
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    definition, state = nnx.split(model)
    sealed = enclave.seal(state)
    assert all(map(_is_sealed, jax.tree.leaves(sealed, is_leaf=_is_sealed)))
    assert "12345" not in repr(sealed)
    opened = enclave.open(sealed)
    assert_close(opened, state)
    again = nnx.merge(definition, opened)
    again.eval()
    model.eval()
    x = uniform(0, 5, 3)
    np.testing.assert_array_equal(again(x), model(x))


# Handles


def test_handles_are_freed_when_dropped(enclave):
    shielded = tempo.shield(lambda x: {"a": x, "b": [x + 1, x * 2]}, enclave=enclave)
    gc.collect()
    before = enclave.statistics()["handles"]

    def held() -> int:
        gc.collect()
        return enclave.statistics()["handles"] - before

    kept = shielded(jnp.ones(3))
    assert held() == 3
    copied = jax.tree.map(lambda x: x, kept)  # new arrays around the same handles
    del kept
    assert held() == 3
    part = copied["b"]
    del copied
    assert held() == 2
    np.testing.assert_array_equal(enclave.open(part[0]), np.full(3, 2.0))
    del part
    assert held() == 0


def test_handles_do_not_pile_up_in_training(enclave):
    shielded = tempo.shield(lambda state, x: (state + x, x * state), enclave=enclave)
    state, _ = shielded(enclave.seal(jnp.zeros(3)), jnp.ones(3))
    gc.collect()
    before = enclave.statistics()["handles"]
    for _ in range(5):
        state, _ = shielded(state, jnp.ones(3))
    gc.collect()
    assert enclave.statistics()["handles"] == before
    np.testing.assert_array_equal(enclave.open(state), np.full(3, 6.0))


def test_dropping_a_handle_waits_for_nothing(enclave):
    # A finalizer runs wherever the collector happens to run: also in a callback of the very
    # program whose result, a new handle, another thread is waiting for.
    class Handle:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            asked.set()
            ready.wait(SECONDS)
            return named_words(bytes(16))

    asked, ready, coming = threading.Event(), threading.Event(), Handle()
    kept = tempo.shield(lambda x: x + 1, enclave=enclave)(jnp.ones(3))
    with ThreadPoolExecutor() as pool:
        adopted = pool.submit(enclave.adopt, coming)
        assert asked.wait(SECONDS)
        start = time.monotonic()
        del kept
        gc.collect()
        waited = time.monotonic() - start
        ready.set()
        adopted.result()
    assert waited < SECONDS / 2
