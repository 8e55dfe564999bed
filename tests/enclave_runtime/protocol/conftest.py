"""Programs with every part, and their fields."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from enclave_runtime.protocol.program import (
    Program,
)
from tempo_jax.schemes import Mixing
from tests.support.interpreter import plan
from tests.support.programs import as_it_crosses, with_executables
from tests.support.steps import momentum_step, shield_all, uniform


@pytest.fixture(scope="module")
def program(enclave) -> Program:
    """A real plan's program, with every kind of port and crossing."""
    constant = uniform(9, 3, 2)
    params = {"first": uniform(1, 5, 4), "bias": uniform(2, 4), "second": uniform(3, 4, 2)}
    state = params, optax.sgd(0.1, momentum=0.9).init(params)
    shielded = shield_all(
        lambda state, x, y: momentum_step(state, x, y + constant), enclave=enclave, public=("y",)
    )
    planned = shielded.explain(state, uniform(4, 3, 5), uniform(5, 3, 2)).plan
    return with_executables(planned.program)


def _products(x: jax.Array, w: jax.Array, y: jax.Array, v: jax.Array) -> Any:
    return jnp.tanh(x @ w), jnp.tanh(y @ v)


@pytest.fixture(scope="module")
def product_program() -> Program:
    """A program with keys per product, one of them for a batch of matrices."""
    shapes = (130, 64), (64, 65), (2, 128, 64), (2, 64, 66)
    operands = (uniform(i, *shape) for i, shape in enumerate(shapes))
    scheme = Mixing(decoy_rows=32, mask_energy=0.0)
    return with_executables(plan(_products, *operands, scheme=scheme).plan.program)


@pytest.fixture(scope="module")
def verified_program() -> Program:
    """A program whose products are checked, a convolution among them."""

    def products(x: jax.Array, w: jax.Array, image: jax.Array, kernel: jax.Array) -> Any:
        convolved = jax.lax.conv_general_dilated(image, kernel, (2, 1), "SAME")
        return jnp.tanh(x @ w), jnp.tanh(convolved)

    shapes = (6, 5), (5, 4), (3, 4, 6, 6), (5, 4, 3, 3)
    operands = (uniform(i, *shape) for i, shape in enumerate(shapes))
    return with_executables(plan(products, *operands, verify=True).plan.program)


@pytest.fixture(scope="module", params=["program", "product_program", "verified_program"])
def any_program(request) -> Program:
    """One of them."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def fields(program) -> Any:
    """The first program's description."""
    return as_it_crosses(program)


@pytest.fixture
def product_fields(product_program) -> Any:
    """The second program's description."""
    return as_it_crosses(product_program)
