"""JAX's context settings mean around a shielded call what they mean around plain `jit`."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import tempo_jax as tempo
from tempo_jax.schemes import SignedPermutation
from tests.support.fresh import run_fresh

ROWS, WIDTH = 256, 128
X = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting, a function on which it shows, and its arguments.

    Attributes:
      setting: makes the context.
      function: of two arrays.
      arguments: default `X` and `W`.
      rtol: between shielded and plain values, of the largest one.
    """

    setting: Callable[[], Any]
    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...] = (X, W)
    rtol: float = 1e-4


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def wide(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.asarray(x, float) @ jnp.asarray(w, float) / 3


def drawn(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w + jax.random.normal(jax.random.key(7), (ROWS, WIDTH))


def raw_key(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w + jax.random.normal(jax.random.PRNGKey(7), (ROWS, WIDTH))


def reused(x: jax.Array, w: jax.Array) -> jax.Array:
    key = jax.random.key(0)
    return x @ w + jax.random.normal(key, (WIDTH,)) + jax.random.normal(key, (WIDTH,))


def mixed(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w + jnp.arange(WIDTH, dtype=jnp.int32)[None]


def ranks(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w + jnp.ones(WIDTH)


def spelled(x: jax.Array, w: jax.Array) -> jax.Array:
    return (x @ w).astype("float64")


def root(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sqrt(x @ w)


def quotient(x: jax.Array, w: jax.Array) -> jax.Array:
    return (x @ w) / jnp.zeros(())


def looped(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x)


def steep(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.grad(lambda v: jax.nn.softmax(x @ v).max(-1).sum())(w)


def mesh() -> Mesh:
    return jax.make_mesh((1,), ("data",))


CASES = {
    "enable_x64": Case(lambda: jax.enable_x64(True), wide),
    "matmul precision": Case(lambda: jax.default_matmul_precision("highest"), product),
    "matmul algorithm": Case(
        lambda: jax.default_matmul_precision("BF16_BF16_F32"), product, rtol=0.1
    ),
    "default_device": Case(lambda: jax.default_device(jax.devices()[1]), product),
    "dtype promotion": Case(lambda: jax.numpy_dtype_promotion("strict"), mixed),
    "rank promotion": Case(lambda: jax.numpy_rank_promotion("raise"), ranks),
    "debug_nans": Case(lambda: jax.debug_nans(True), root),
    "debug_nans, none": Case(lambda: jax.debug_nans(True), product),
    "debug_infs": Case(lambda: jax.debug_infs(True), quotient),
    "debug_infs, none": Case(lambda: jax.debug_infs(True), product),
    "set_mesh": Case(lambda: jax.set_mesh(mesh()), product),
    "with mesh": Case(mesh, product),
    "default_prng_impl": Case(lambda: jax.default_prng_impl("rbg"), drawn),
    "threefry_partitionable": Case(lambda: jax.threefry_partitionable(False), drawn),
    "legacy_prng_key": Case(lambda: jax.legacy_prng_key("error"), raw_key),
    "debug_key_reuse": Case(lambda: jax.debug_key_reuse(True), reused),
    "disable_jit": Case(lambda: jax.disable_jit(True), looped, rtol=1e-3),
    "transfer_guard": Case(lambda: jax.transfer_guard("disallow"), product),
    "checks": Case(lambda: jax.enable_checks(True), looped, rtol=1e-3),
    "tracer leaks": Case(jax.checking_leaks, looped, rtol=1e-3),
    "log_compiles": Case(lambda: jax.log_compiles(False), steep),
}


def outcome(call: Callable[..., Any], arguments: Any, context: Any) -> tuple[Any, ...]:
    """What a call gives: an error's or a warning's type, or a type, devices and values."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            with context:
                found = jax.block_until_ready(call(*arguments))
        except Exception as error:
            return (type(error),)
    warned = {w.category for w in heard}
    return warned, found.dtype, found.devices(), np.asarray(found)


def compare(name: str, case: Case, ours: Any, plain: Any, arguments: Any) -> None:
    """The setting is off, on and off again, so that neither program may stand for the other."""
    for setting in (contextlib.nullcontext, case.setting, contextlib.nullcontext):
        found = outcome(ours, arguments, setting())
        wanted = outcome(plain, arguments, setting())
        assert found[:-1] == wanted[:-1], f"{name}: {found}, expected {wanted}"
        if len(wanted) == 1:
            assert issubclass(found[0], wanted[0]), f"{name}: {found}, expected {wanted}"
            continue
        rtol = case.rtol if found[-1].dtype == np.float32 else 1e-12
        values = wanted[-1][np.isfinite(wanted[-1])]
        scale = np.abs(values).max() if values.size else 1
        np.testing.assert_allclose(found[-1], wanted[-1], rtol=0, atol=rtol * scale, err_msg=name)


def every_setting() -> None:
    with tempo.Enclave.launch() as enclave:
        for name, case in CASES.items():
            ours = tempo.shield(
                lambda *a, f=case.function: tempo.reveal(f(*a)),
                enclave=enclave,
                scheme=SignedPermutation(),
                offload="all",
            )
            arguments = tuple(map(jnp.asarray, case.arguments))
            compare(name, case, ours, jax.jit(case.function), arguments)


def transfers_of_our_own() -> None:
    """A guard against transfers by accident is not about sealing, opening and handles."""
    with tempo.Enclave.launch(checkpoint_key=tempo.CheckpointKey.generate()) as enclave:
        ours = tempo.shield(product, enclave=enclave, offload="all", donate=False)
        with jax.transfer_guard("disallow"):
            sealed = enclave.seal((X, W))
            for call in (ours, jax.jit(ours)):
                again = enclave.restore(enclave.checkpoint(call(*sealed)), like=X)
                np.testing.assert_allclose(
                    enclave.open(enclave.copy(again)), np.tanh(X @ W), atol=2e-3
                )


def constrained(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(lax.with_sharding_constraint(x, PartitionSpec("data")) @ w)


def a_mesh_of_several_devices() -> None:
    """`jax.set_mesh` says where plain arrays lie; the enclave has one processor."""
    kinds = (AxisType.Explicit, AxisType.Auto)
    meshes = [jax.make_mesh((2,), ("data",), axis_types=(kind,)) for kind in kinds]
    with tempo.Enclave.launch() as enclave:
        options: Any = {"scheme": SignedPermutation(), "offload": "all", "donate": False}
        sealed = enclave.seal((X, W))
        for mesh in meshes:
            functions = [product, looped, steep]
            functions += [constrained] if mesh is meshes[1] else []
            for function in functions:

                def revealing(*a: Any, f: Any = function) -> Any:
                    return tempo.reveal(f(*a))

                with jax.set_mesh(mesh):
                    plain = np.asarray(jax.jit(function)(X, W))
                    ours = tempo.shield(revealing, enclave=enclave, **options)
                    spread = tempo.shield(revealing, enclave=enclave, mesh=mesh, **options)
                    for call in (ours, spread, jax.jit(spread)):
                        np.testing.assert_allclose(call(*sealed), plain, atol=1e-3)
                    with pytest.raises(tempo.errors.UnsupportedError, match="mesh=mesh"):
                        jax.jit(ours)(*sealed)


def test_a_mesh_around_is_not_the_enclaves():
    run_fresh(a_mesh_of_several_devices, devices=2)


@pytest.mark.slow
def test_settings_mean_what_they_mean_around_jit():
    run_fresh(every_setting, transfers_of_our_own, devices=2)
