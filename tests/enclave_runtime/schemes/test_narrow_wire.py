"""`Mixing(wire="bfloat16")`: fewer bytes, an error that is stated, and checks as sharp as ever."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import tempo_jax as tempo
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import ArrayType, KeyClass, Layout, ProgramError
from enclave_runtime.schemes import check_program
from tempo_jax import errors
from tempo_jax.schemes import Mixing
from tests.support.interpreter import plan
from tests.support.steps import uniform
from tests.support.two_layers import DECOYS, two_layers
from tests.support.verification import ERROR, lying, rms

NARROW = Mixing(wire="bfloat16")
NARROW_DECOYS = dataclasses.replace(DECOYS, wire="bfloat16")
BARE = Mixing(mask_energy=0, wire="bfloat16")
SCHEMES = pytest.mark.parametrize(
    "scheme", [NARROW, NARROW_DECOYS, BARE], ids=["masks", "decoys", "bare"]
)


def single(rows: int = 256) -> tuple[Any, jax.Array]:
    # Small enough for tanh to be far from flat, where its slope would hang on every digit.
    p = {n: uniform(i, 128, 128, dtype="float32") / 8 for i, n in enumerate("abc")}
    return p, uniform(7, rows, 128, dtype="float32")


def multiplied(enclave: tempo.Enclave, scheme: Any, x: Any, w: Any, **options: Any) -> Any:
    options |= {"enclave": enclave, "scheme": scheme, "offload": "all", "donate": False}
    return enclave.open(tempo.shield(lambda x, w: x @ w, **options)(x, w))


def error_of(found: Any, exact: Any) -> float:
    exact = np.asarray(exact, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@SCHEMES
def test_what_crosses_is_a_function_of_the_blinded_value(scheme):
    """So it shows nothing that the blinded value does not."""
    plain = np.asarray(uniform(1, 128, 64, dtype="float32"))
    schedule = KeySchedule()
    decoys = scheme.decoys(128)
    classes = KeyClass(128, decoys=decoys), KeyClass(64)
    seen = []
    for dtype in ("float32", "bfloat16"):
        keys = {i: scheme.draw(c, schedule.stream("key", i)) for i, c in enumerate(classes)}
        out = np.empty((128 + decoys, 64), jnp.dtype(dtype))
        scheme.blind(plain, Layout((0, 1), (1, 1)), keys, out, lambda: schedule.stream("tensor"))
        seen.append(out)
    wide, narrow = seen
    # To the nearest, and of two that are as near to the even one, by its bits.
    bits = wide.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(narrow.view(np.uint16), rounded)


@SCHEMES
def test_devices_add_up_in_float32(scheme, enclave):
    p, x = single()
    with tempo.testing.host_view() as view:
        multiplied(enclave, scheme, x, p["a"])
    (product,) = view.products
    assert [v.dtype.name for v in product.operands] == ["bfloat16", "bfloat16"]
    assert product.result.dtype == np.float32
    lhs, rhs = (np.asarray(v, np.float64) for v in product.operands)
    assert error_of(product.result, lhs @ rhs) < 1e-6


@SCHEMES
def test_errors_are_as_stated(scheme, enclave):
    p, x = single()
    exact = np.asarray(x, np.float64) @ np.asarray(p["a"], np.float64)
    plain = jnp.matmul(
        x.astype("bfloat16"), p["a"].astype("bfloat16"), preferred_element_type="float32"
    )
    error, stated = (
        error_of(multiplied(enclave, scheme, x, p["a"]), exact),
        scheme.narrowing("float32"),
    )
    assert error_of(plain, exact) < error < 1.3 * stated
    assert error > stated / 3
    assert f"{stated:.1e}" in scheme.rounding and "bfloat16" in scheme.rounding


def test_gradients_are_as_near(enclave):
    p, x = single()
    expected = jax.grad(two_layers)(p, x)
    for scheme in (NARROW, NARROW_DECOYS):
        step = tempo.shield(jax.grad(two_layers), enclave=enclave, scheme=scheme, offload="all")
        found = enclave.open(step(p, x))
        for name in p:
            assert 1e-4 < error_of(found[name], expected[name]) < 5 * scheme.narrowing("float32")


def test_bytes_down_are_half_of_float32s(enclave):
    wide, narrow = reports = [
        tempo.shield(jax.grad(two_layers), enclave=enclave, scheme=scheme, offload="all").explain(
            *single()
        )
        for scheme in (Mixing(), NARROW)
    ]
    assert narrow.bytes_up == wide.bytes_up
    assert narrow.bytes_down == wide.bytes_down // 2
    assert "cross in bfloat16" in str(reports[1]) and "bfloat16" not in str(reports[0])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_formats_cross_as_they_are(dtype, enclave):
    assert not NARROW.narrowing(dtype)
    x, w = uniform(1, 256, 128, dtype=dtype), uniform(2, 128, 128, dtype=dtype)
    found = []
    for scheme in (Mixing(), NARROW):
        with tempo.testing.host_view() as view:
            multiplied(enclave, scheme, x, w)
        found.append([v.dtype for v in view.products[0].operands])
    assert found[0] == found[1] == [x.dtype, x.dtype]


@SCHEMES
def test_checks_are_as_sharp(scheme, enclave):
    p, x = single()
    honest = multiplied(enclave, scheme, x, p["a"], verify=True)
    exact = np.asarray(x, np.float64) @ np.asarray(p["a"], np.float64)
    assert error_of(honest, exact) < 1.3 * scheme.narrowing("float32")

    def one_element(y: np.ndarray) -> np.ndarray:
        y[3, 5] += ERROR * rms(y)  # far below what the format rounds
        return y

    with lying(one_element, 1), pytest.raises(errors.IntegrityError, match="wrong product"):
        multiplied(enclave, scheme, x, p["a"], verify=True)


def test_on_a_mesh(enclave):
    p, x = single()
    mesh = Mesh(np.array(jax.devices()[:2]), ("workers",))
    step = tempo.shield(
        jax.grad(two_layers), enclave=enclave, scheme=NARROW_DECOYS, offload="all", mesh=mesh
    )
    assert step.explain(p, x).plan.sharded
    found, expected = enclave.open(step(p, x)), jax.grad(two_layers)(p, x)
    for name in p:
        assert error_of(found[name], expected[name]) < 5 * NARROW_DECOYS.narrowing("float32")


def test_programs_and_schemes_must_agree():
    program = plan(lambda x, w: x @ w, single()[1], single()[0]["a"], scheme=NARROW).plan.program
    check_program(program, NARROW)
    with pytest.raises(ProgramError, match="wrong blinded type"):
        check_program(program, Mixing())
    array = ArrayType((2, 3), "float32")
    assert NARROW.representation(array, product=True) == array
    assert NARROW.representation(array, product=False) == ArrayType((2, 3), "bfloat16")
    with pytest.raises(ValueError, match=r"wire is None or \"bfloat16\""):
        Mixing(wire="float16")
