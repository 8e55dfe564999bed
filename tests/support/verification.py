"""What the tests of verification share: products, programs that verify, and devices that lie."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.crypto.keys import KeySchedule, KeyStream
from enclave_runtime.protocol.descriptions import Convolution, DotGeneral, ProductDescription
from enclave_runtime.protocol.program import ArrayType
from tempo_jax.running.call import Runtime
from tempo_jax.schemes import SignedPermutation
from tests.support.interpreter import plan
from tests.support.steps import uniform

ERROR = 1e-3  # of an RMS: what is promised to be noticed
SCHEDULE = KeySchedule()
STREAMS = iter(range(1 << 30))

FORWARD = DotGeneral(((1,), (0,)), ((), ()))
TO_INPUT = DotGeneral(((1,), (1,)), ((), ()))
TO_WEIGHT = DotGeneral(((0,), (0,)), ((), ()))
SCORES = DotGeneral(((2,), (2,)), ((0,), (0,)))
NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # as axes: batch, feature, then space


def convolution(groups: int = 1, batch_groups: int = 1) -> Convolution:
    """A strided 3×3 convolution."""
    ones = (1, 1)
    return Convolution((2, 2), ((1, 1), (0, 1)), ones, ones, *NHWC, groups, batch_groups)


# The gradient of a kernel: batch and features change places.
KERNEL_GRADIENT = Convolution(
    *((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    *((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1), 1, 1),
)

CASES: dict[str, tuple[ProductDescription, tuple[int, ...], tuple[int, ...]]] = {
    "forward": (FORWARD, (48, 40), (40, 24)),
    "to input": (TO_INPUT, (48, 24), (40, 24)),
    "to weight": (TO_WEIGHT, (48, 40), (48, 24)),
    "batched": (SCORES, (3, 16, 8), (3, 20, 8)),
    "two batches": (DotGeneral(((1,), (3,)), ((0, 2), (0, 1))), (2, 5, 3, 7), (2, 3, 6, 5)),
    "several free axes": (FORWARD, (16, 12), (12, 3, 5)),
    "several contracted axes": (DotGeneral(((1, 2), (1, 0)), ((), ())), (9, 4, 5), (5, 4, 18)),
    "vector": (FORWARD, (12, 8), (8,)),
    "outer": (DotGeneral(((), ()), ((), ())), (6,), (7,)),
    "one element": (FORWARD, (1, 1), (1, 1)),
    "one column": (FORWARD, (9, 5), (5, 1)),
    "wide": (FORWARD, (64, 1024), (1024, 1024)),
    "long": (TO_WEIGHT, (8192, 32), (8192, 64)),
    "convolution": (convolution(), (4, 8, 8, 6), (3, 3, 6, 20)),
    "grouped": (convolution(groups=3), (4, 8, 8, 6), (3, 3, 2, 18)),
    "depthwise": (convolution(groups=6), (4, 8, 8, 6), (3, 3, 1, 6)),
    "batch groups": (convolution(batch_groups=2), (4, 8, 8, 6), (3, 3, 6, 20)),
    "kernel's gradient": (KERNEL_GRADIENT, (4, 8, 8, 6), (4, 8, 8, 20)),
}


def stream() -> KeyStream:
    """A secret stream of its own for each draw."""
    return SCHEDULE.stream("test", next(STREAMS))


def array_type(x: Any) -> ArrayType:
    return ArrayType(tuple(x.shape), np.dtype(x.dtype).name)


def rms(x: Any) -> float:
    """The root of the mean square of an array's elements."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def altered(out: Any, rng: np.random.Generator, error: float) -> np.ndarray:
    """One element, wherever it is, wrong by this much."""
    wrong = np.array(out)
    wrong[tuple(rng.integers(0, n) for n in wrong.shape)] += error
    return wrong


# Programs


def chain(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """A product of a product."""
    return (x @ w) @ v


X, W, V = uniform(1, 18, 17), uniform(2, 17, 20), uniform(3, 20, 19)


def planned(function: Callable[..., Any], *arguments: Any, scheme: Any = None) -> Any:
    """The plan of a function that verifies."""
    return plan(function, *arguments, scheme=scheme or SignedPermutation(), verify=True).plan


def mlp_training(tx: optax.GradientTransformation) -> tuple[Callable[..., Any], Any, Any]:
    """A step of a small MLP, its state and a batch."""
    tx = tempo.cheap_update(tx)

    def step(state: Any, x: Any) -> Any:
        params, optimizer = state

        def loss_of(params: Any) -> Any:
            hidden = jnp.tanh(x @ params["first"] + params["bias"])
            return jnp.mean((jnp.tanh(hidden @ params["second"])) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, optimizer = tx.update(gradients, optimizer, params)
        return (optax.apply_updates(params, changes), optimizer), tempo.reveal(loss)

    params = {"first": uniform(1, 12, 10), "bias": uniform(2, 10), "second": uniform(3, 10, 8)}
    return step, (params, tx.init(params)), uniform(4, 14, 12)


MOMENTUM = optax.sgd(0.1, momentum=0.9)


def planned_training(scheme: Any, tx: Any = MOMENTUM) -> Any:
    """The plan of `mlp_training`'s step, which verifies and follows leaves."""
    step, state, x = mlp_training(tx)
    return plan(step, state, x, stateful=True, scheme=scheme, verify=True).plan


# Devices that lie

Alter = Callable[[np.ndarray], np.ndarray]


@contextlib.contextmanager
def lying(alter: Alter, segment: int, upload: int = 0, worker: int = 0) -> Iterator[None]:
    """A device that alters one of the products on its way to shared memory."""
    visit = Runtime._bring

    def dishonest(self: Any, run: Any, number: int, index: int, uploads: Any) -> Any:
        uploads = list(uploads)
        if (number, index) == (worker, segment):
            uploads[upload] = alter(np.array(uploads[upload]))
        return visit(self, run, number, index, uploads)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runtime, "_bring", dishonest)
        yield


def one_element(x: np.ndarray) -> np.ndarray:
    """Makes one element wrong by `ERROR` of the RMS."""
    x = np.array(x)
    x.reshape(-1)[x.size // 2] += ERROR * rms(x)
    return x
