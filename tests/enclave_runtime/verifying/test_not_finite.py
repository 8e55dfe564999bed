"""What is not finite is noticed at any size, under the compiler's default flags.

XLA's maximum on a CPU forgets NaN in arrays of some thousand elements, so checks that decided by
one let a wrong product pass; small arrays and unoptimised programs did not show it.
"""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.descriptions import DotGeneral
from enclave_runtime.protocol.program import ArrayType
from enclave_runtime.verifying import checksum, integrity
from enclave_runtime.verifying.integrity import Check, WrongProductError
from tempo_jax.schemes import Mixing, SignedPermutation
from tests.support.fresh import run_fresh
from tests.support.verification import lying

ROWS = (255, 4096, 100_000)  # below, at and far above what XLA hands to its library
NOT_FINITE = (np.nan, np.inf, -np.inf)
FORWARD = DotGeneral(((1,), (0,)), ((), ()))
SCHEDULE = KeySchedule()
STREAMS = itertools.count()


def operands(rows: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    return rng.standard_normal((rows, 12)).astype(dtype), rng.standard_normal((12, 8)).astype(dtype)


def typed(x: np.ndarray) -> ArrayType:
    return ArrayType(x.shape, x.dtype.name)


def with_one(x: np.ndarray, value: float) -> np.ndarray:
    """A copy with one element replaced, near its end."""
    x = x.copy()
    x[-3, -2] = value
    return x


def judge_products() -> None:
    """Lies about products, and operands that are not finite."""
    jax.config.update("jax_enable_x64", True)  # as the enclave's own process does
    for rows, dtype in (*((rows, "float32") for rows in ROWS), (4096, "float64")):
        lhs, rhs = operands(rows, dtype)
        out = lhs @ rhs
        check = Check(FORWARD, typed(lhs), typed(rhs), typed(out))

        def judged(lhs, rhs, out, check=check):
            return integrity.matches(check, lhs, rhs, out, SCHEDULE.stream("t", next(STREAMS)))

        assert judged(lhs, rhs, out) is True
        for value in NOT_FINITE:
            assert judged(lhs, rhs, with_one(out, value)) is False, (rows, dtype, value)
            for x, w in ((with_one(lhs, value), rhs), (lhs, with_one(rhs, value))):
                with np.errstate(invalid="ignore"):
                    honest = x @ w
                # Nothing to compare, so the enclave computes the product itself.
                assert judged(x, w, honest) is None, (rows, dtype, value)


def judge_leaves() -> None:
    """Lies about products with a leaf, and about the leaf, whose sketch is all the enclave has."""
    jax.config.update("jax_enable_x64", True)
    for rows in ROWS:
        other, leaf = operands(rows, "float32")
        out, use = other @ leaf, checksum.leaf_use(FORWARD, (2, 2), 1)

        def sketch(leaf=leaf, use=use):
            signs = checksum.Signs(typed(leaf), use.axes, SCHEDULE.stream("t", next(STREAMS)))
            return checksum.sketch(signs, leaf, use.axes)

        def judge(other, out, use=use, leaf=leaf, sketch=sketch):
            sent = jnp.asarray(other), jnp.asarray(out)
            checksum.check_product(use, sketch(), leaf.shape, *sent, "a product")

        judge(other, out)
        for value in NOT_FINITE:
            with pytest.raises(WrongProductError, match="wrong product"):
                judge(other, with_one(out, value))
            with pytest.raises(WrongProductError, match="not finite"):
                judge(with_one(other, value), out)
    tall = np.random.default_rng(0).standard_normal((100_000, 8)).astype(np.float32)
    for axes, value in itertools.product(((0,), (1,)), NOT_FINITE):
        signs = checksum.Signs(typed(tall), axes, SCHEDULE.stream("t", next(STREAMS)))
        held = checksum.sketch(signs, tall, axes)
        assert checksum.leaf_matches(held, tall, axes)
        assert not checksum.leaf_matches(held, with_one(tall, value), axes)


def train_with_liars() -> None:
    """Lies on their way into an enclave, under the default scheme and one that keeps weights."""
    logging.disable(logging.CRITICAL)
    x = np.random.default_rng(0).standard_normal((4096, 128)).astype(np.float32)
    first = np.random.default_rng(1).standard_normal((128, 64)).astype(np.float32)
    weights = {"first": first, "last": first[:64, :4]}

    def loss_of(weights, x):
        # A relu forgets -inf and a minimum inf: what comes out can look sound.
        hidden = jnp.minimum(jax.nn.relu(x @ weights["first"]), 3.0)
        return jnp.mean((hidden @ weights["last"]) ** 2)

    def step(weights, x):
        loss, gradients = jax.value_and_grad(loss_of)(weights, x)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients), tempo.reveal(loss)

    plain = jax.jit(step)(weights, x)
    with tempo.Enclave.launch() as enclave:
        for scheme in (Mixing(), SignedPermutation()):
            shielded = tempo.shield(
                step, enclave=enclave, scheme=scheme, offload="all", verify=True, donate=False
            )
            new, loss = shielded(weights, x)
            np.testing.assert_allclose(loss, plain[1], rtol=1e-4)
            for name, value in enclave.open(new).items():
                np.testing.assert_allclose(value, plain[0][name], atol=1e-4)
            for value in NOT_FINITE:
                with lying(lambda y, value=value: with_one(y, value), 1):
                    with pytest.raises(tempo.errors.IntegrityError, match="wrong product"):
                        shielded(weights, x)


def test_what_is_not_finite_is_noticed():
    run_fresh(judge_products, judge_leaves, train_with_liars)
