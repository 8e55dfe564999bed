"""`vmap`, `grad` and `eval_shape` around a shielded function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from tempo_jax.errors import SecrecyError, UnsupportedError
from tempo_jax.schemes import SignedPermutation
from tests.support.fresh import run_fresh

ROWS, WIDTH, BATCH = 256, 64, 3


def _arrays() -> tuple[dict[str, jax.Array], jax.Array]:
    rng = np.random.default_rng(0)
    w = rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH))
    return {"w": jnp.asarray(w)}, jnp.asarray(rng.standard_normal((BATCH, ROWS, WIDTH)))


def model(p: Any, x: jax.Array, scale: Any = 1.0) -> Any:
    y = jnp.tanh(x @ p["w"]) * scale
    return tempo.reveal({"y": y, "size": jnp.square(x).sum(), "weights": p["w"].sum()})


def sealed_model(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def _shield(function: Any, enclave: Any, **options: Any) -> Any:
    return tempo.shield(
        function, enclave=enclave, scheme=SignedPermutation(), offload="all", **options
    )


def _close(found: Any, plain: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert (a.shape, a.dtype) == (b.shape, jnp.float64)
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def vmap_runs_the_batched_plan() -> None:
    jax.config.update("jax_enable_x64", True)
    p, x = _arrays()
    with tempo.Enclave.launch() as enclave:
        shielded = _shield(model, enclave)
        _close(jax.vmap(shielded, (None, 0))(p, x), jax.vmap(model, (None, 0))(p, x))
        moved = jnp.moveaxis(x, 0, 2)
        axes = {"in_axes": (None, 2), "out_axes": {"y": 1, "size": 0, "weights": 0}}
        _close(jax.vmap(shielded, **axes)(p, moved), jax.vmap(model, **axes)(p, moved))
        sealed = enclave.seal(p)
        scales = jnp.arange(1.0, 4.0)
        found = jax.vmap(lambda x, s: shielded(sealed, x, scale=s))(x, scales)
        _close(found, jax.vmap(lambda x, s: model(p, x, scale=s))(x, scales))
        # Nested, with an argument of each, and one that neither maps.
        twice = jax.vmap(jax.vmap(shielded, (None, 0, None)), (None, None, 0))
        plain = jax.vmap(jax.vmap(model, (None, 0, None)), (None, None, 0))
        _close(twice(p, x, scales), plain(p, x, scales))
        assert shielded.explain(p, x[0]).round_trips == 2

        public = _shield(model, enclave, public=("x",))
        batched = jax.jit(jax.vmap(lambda x: public(sealed, x)))
        _close(batched(x), jax.vmap(lambda x: model(p, x))(x))

        with pytest.raises(UnsupportedError, match=r"sealed_model.*shield\(jax.vmap\(f\)\)"):
            jax.vmap(_shield(sealed_model, enclave), (None, 0))(p, x)
        inner = _shield(jax.vmap(sealed_model, (None, 0)), enclave)
        _close(enclave.open(inner(p, x)), jax.vmap(sealed_model, (None, 0))(p, x))
        aside = jax.vmap(model, **axes)
        _close(_shield(aside, enclave)(p, moved), aside(p, moved))
        with pytest.raises(UnsupportedError, match="through a surrounding jit"):
            jax.vmap(jax.jit(lambda x: public(sealed, x)))(x)
        with pytest.raises(SecrecyError, match="a plain float64"):
            jax.jit(jax.vmap(lambda x: shielded(sealed, x)))(x)


def grad_belongs_inside() -> None:
    jax.config.update("jax_enable_x64", True)
    p, x = _arrays()

    def loss(p: Any, x: jax.Array) -> jax.Array:
        return tempo.reveal(jnp.square(jnp.tanh(x @ p["w"])).mean())

    with tempo.Enclave.launch() as enclave:
        shielded = _shield(loss, enclave)
        public = _shield(loss, enclave, public=("p", "x"))
        tangents = jax.tree.map(jnp.ones_like, p)
        around = [
            lambda: jax.grad(shielded)(p, x[0]),
            lambda: jax.value_and_grad(public)(p, x[0]),
            lambda: jax.jvp(lambda p: shielded(p, x[0]), (p,), (tangents,)),
            lambda: jax.vjp(lambda p: public(p, x[0]), p),
            lambda: jax.vmap(jax.grad(shielded), (None, 0))(p, x),
            lambda: jax.grad(lambda p: jax.vmap(shielded, (None, 0))(p, x).sum())(p),
            lambda: jax.hessian(shielded)(p, x[0]),
        ]
        for transformed in around:
            with pytest.raises(UnsupportedError, match=r"`loss`.*shield\(jax.grad\(f\)\)"):
                transformed()
        with pytest.raises(UnsupportedError, match="through a surrounding jit"):
            jax.grad(lambda p: jax.jit(public)(p, x[0]))(p)
        inside = _shield(jax.grad(loss), enclave)
        _close(enclave.open(inside(p, x[0])), jax.grad(loss)(p, x[0]))
        # What is not differentiated may be called.
        constant = shielded(p, x[0])
        found = jax.grad(lambda a: a * shielded(p, x[0]))(2.0)
        np.testing.assert_allclose(found, constant, rtol=1e-10)


def eval_shape_takes_plain_arguments() -> None:
    jax.config.update("jax_enable_x64", True)
    p, x = _arrays()
    with tempo.Enclave.launch() as enclave:
        for function in (model, sealed_model):
            shielded = _shield(function, enclave)
            found = jax.eval_shape(shielded, p, x[0])
            plain = jax.eval_shape(function, p, x[0])
            for a, b in zip(
                jax.tree.leaves(found, is_leaf=tempo.is_sealed), jax.tree.leaves(plain), strict=True
            ):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert tempo.is_sealed(a) == (function is sealed_model)
            sealed = jax.eval_shape(shielded, enclave.seal(p), enclave.seal(x[0]))
            assert jax.tree.structure(sealed) == jax.tree.structure(found)
        # What was traced for its types is refused when it is to run.
        jitted = jax.jit(shielded)
        assert tempo.is_sealed(jax.eval_shape(jitted, p, x[0]))
        with pytest.raises(SecrecyError, match="Seal it with `enclave.seal`"):
            jitted(p, x[0])


def test_vmap():
    run_fresh(vmap_runs_the_batched_plan)


def test_grad_and_eval_shape():
    run_fresh(grad_belongs_inside, eval_shape_takes_plain_arguments)
