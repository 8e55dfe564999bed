"""State of narrow types (quantized weights, 8-bit floats), or a refusal by the leaf's name."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import tempo_jax as tempo
from tempo_jax.errors import UnsupportedError
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.support.fresh import run_fresh

ROWS, WIDTH = 256, 64
INTEGERS = ("int2", "uint2", "int4", "uint4")
FLOATS = (
    *("float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "bfloat16"),
)


def initial():
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 2, (WIDTH, WIDTH)).astype(np.int8)
    some = rng.choice([0.5, 1, 2], (WIDTH, WIDTH)).astype(np.float32)
    state = {name: jnp.asarray(whole).astype(name) for name in INTEGERS}
    return state | {name: jnp.asarray(some).astype(name) for name in FLOATS}


def step(state, x):
    """Products with every weight, and each weight by another rule; `bfloat16` is the only float.

    The sums are of small integers and halves, so that their order does not matter.
    """
    wide = {name: w.astype(jnp.float32) for name, w in state.items()}
    sums = {name: jnp.sum(x @ w) for name, w in wide.items()}
    narrow = jnp.sum(x.astype(jnp.float8_e4m3fn) @ state["float8_e4m3fn"], dtype=jnp.float32)
    new = {
        name: jnp.flip((1 - w if name in INTEGERS else 2.5 - w).astype(state[name].dtype), 0)
        for name, w in wide.items()
    }
    return new, tempo.reveal((sums, narrow, new["int4"], new["float4_e2m1fn"]))


def check(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        wide = [np.asarray(x.astype(jnp.float32)) for x in (ours, theirs)]
        np.testing.assert_allclose(*wide, rtol=1e-2)


def batch():
    return jnp.asarray(np.random.default_rng(1).integers(0, 2, (ROWS, WIDTH)), jnp.float32)


def over_several_steps() -> None:
    plain = initial()
    results = []
    for _ in range(3):
        plain, result = jax.jit(step)(plain, batch())
        results.append(result)
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), SignedPermutation(), Orthogonal(budget=4), Tempo()):
            shielded = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
            state = enclave.seal(initial())
            for expected in results:
                state, result = shielded(state, batch())
                check(result, expected)
            check(enclave.open(state), plain)


def kept_and_moved() -> None:
    key = tempo.CheckpointKey.generate()
    plain, _ = jax.jit(step)(initial(), batch())
    with (
        tempo.Enclave.launch(checkpoint_key=key) as enclave,
        tempfile.TemporaryDirectory() as folder,
    ):
        shielded = tempo.shield(step, enclave=enclave, offload="all")
        state, _ = shielded(enclave.seal(initial()), batch())
        data = enclave.checkpoint(state)
        check(enclave.open(enclave.restore(data, like=initial())), plain)
        check(tempo.checkpoints.open_checkpoint(data, key, like=initial()), plain)
        check(enclave.open(enclave.copy(state)), plain)
        path = Path(folder, "state")
        for tree in (state, enclave.seal(plain)):
            tempo.save_sealed(path, tree)
            check(enclave.open(tempo.load_sealed(path, like=initial())), plain)

        @jax.jit
        def twice(state):
            return jax.lax.scan(lambda s, _: (shielded(s, enclave_batch)[0], None), state, length=2)

        enclave_batch = enclave.seal(batch())
        after, _ = twice(state)
        for _ in range(2):
            plain, _ = jax.jit(step)(plain, batch())
        check(enclave.open(after), plain)
        double = tempo.shield(
            lambda x: tempo.reveal(x.astype(jnp.int8) * 2), enclave=enclave, public="x"
        )
        assert double(jnp.arange(4).astype(jnp.int4)).tolist() == [0, 2, 4, 6]


@pytest.mark.slow
def test_narrow_state_trains():
    run_fresh(over_several_steps, kept_and_moved)


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (np.ones(3, ">f4"), r"foreign byte order of >f4.*`.astype\('float32'\)`"),
        (np.ones(3, ">i8"), r"foreign byte order of >i8.*`.astype\('int64'\)`"),
        (np.zeros(3, ml_dtypes.float6_e2m3fn), "is float6_e2m3fn, which XLA does not compile"),
        (np.zeros(3, ml_dtypes.float6_e3m2fn), "is float6_e3m2fn, which XLA does not compile"),
        (np.zeros(3, np.longdouble), "has the dtype float128, which JAX does not take"),
        (np.array(["a"]), "has the dtype <U1, which JAX does not take"),
        (np.array([None]), "has the dtype object, which JAX does not take"),
        ("text", "of type str is neither an array nor a number"),
    ],
)
def test_what_is_refused_is_named(enclave, leaf, reason):
    state = {"layers": [{"bias": np.ones(2), "scale": leaf}]}
    path = r"\['layers'\]\[0\]\['scale'\]"
    with pytest.raises(UnsupportedError, match=rf"^enclave.seal: leaf `{path}` .*{reason}"):
        enclave.seal(state)
    for public in ("", "state"):
        shielded = tempo.shield(lambda state: state, enclave=enclave, public=public or ())
        with pytest.raises(UnsupportedError, match=rf"^shield: argument `state{path}` .*{reason}"):
            shielded(state)
