"""Enclave and devices work at the same time, on what the other does not wait for."""

import functools
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh

import tempo_jax as tempo
from enclave_runtime.protocol.wire import Kind
from enclave_runtime.schemes.contract import Scheme
from tempo_jax.jaxprs.callbacks import call
from tempo_jax.planning.cost import CostModel
from tempo_jax.running.call import Runtime
from tempo_jax.running.host_run import HostRun
from tempo_jax.schemes import Mixing, SecretShares, SignedPermutation
from tests.support.steps import TOLERANCE, assert_close, uniform

LAYERS, WIDTH, ROWS = 5, 24, 64
ADAM = optax.adam(1e-2)
MIXING, SIGNED, SHARES = Mixing(), SignedPermutation(), SecretShares(insecure_one_pool=True)
shield = functools.partial(tempo.shield, offload="all")


def step(state: Any, x: jax.Array) -> Any:
    """A step of a chain of layers whose weights are updated in the enclave."""
    parameters, moments = state

    def loss(parameters: Any) -> jax.Array:
        y = x
        for w in parameters:
            y = jnp.tanh(y @ w)
        return jnp.mean(y**2)

    value, gradients = jax.value_and_grad(loss)(parameters)
    updates, moments = ADAM.update(gradients, moments, parameters)
    return (optax.apply_updates(parameters, updates), moments), tempo.reveal(value)


def start(dtype: Any = jnp.float64) -> tuple[Any, jax.Array]:
    parameters = [uniform(i, WIDTH, WIDTH, dtype=dtype) / 3 for i in range(LAYERS)]
    return (parameters, ADAM.init(parameters)), uniform(9, ROWS, WIDTH, dtype=dtype)


def trained(enclave: tempo.Enclave, shielded: Any, dtype: Any = jnp.float64) -> Any:
    state, x = enclave.seal(start(dtype))
    for _ in range(2):
        state, value = shielded(state, x)
    return enclave.open(state), value


def beside(shielded: Any, dtype: Any = jnp.float64) -> list[int]:
    segments = shielded.explain(*start(dtype)).plan.cut.segments
    return [index for index, segment in enumerate(segments) if segment.beside]


def ahead(shielded: Any, dtype: Any = jnp.float64) -> list[int]:
    segments = shielded.explain(*start(dtype)).plan.cut.segments
    return [index for index, segment in enumerate(segments) if segment.ahead]


@pytest.fixture(autouse=True)
def small_values_go_ahead(request, monkeypatch):
    """However small: what the tests here send would not be worth a request of its own."""
    if "as_planned" not in request.fixturenames:
        monkeypatch.setattr(CostModel, "may_go_ahead", lambda *_: True)


@pytest.fixture
def as_planned():
    """Nothing goes ahead that costs more than it saves."""


@pytest.fixture
def small_mixing(monkeypatch):
    """Mixing keeps products as small as these inside, for what they would hide too little."""
    monkeypatch.setattr(Mixing, "least_rows", 1)
    monkeypatch.setattr(Mixing, "least_side", 1)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    "scheme, tolerance", [(MIXING, 1e-9), (SIGNED, TOLERANCE)], ids=["mixing", "signed"]
)
def test_results_are_those_of_the_plain_step(
    enclave, small_mixing, scheme, tolerance, verify, devices
):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("w",)) if devices > 1 else None
    shielded = shield(step, enclave=enclave, scheme=scheme, verify=verify, mesh=mesh)
    assert len(beside(shielded)) >= LAYERS - 3 and len(ahead(shielded)) >= LAYERS - 2
    state, x = start()
    for _ in range(2):
        state, value = jax.jit(step)(state, x)
    assert_close(trained(enclave, shielded), (state, value), tolerance)


def test_two_runs_of_an_exact_scheme_give_the_same_bits(enclave):
    shielded = shield(step, enclave=enclave, scheme=SHARES)
    assert beside(shielded, jnp.float32) and ahead(shielded, jnp.float32)
    first, second = (trained(enclave, shielded, jnp.float32) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_step_inside_scan_is_the_same(enclave):
    shielded = shield(step, enclave=enclave, scheme=SIGNED)
    sealed, x = enclave.seal(start())
    sealed, _ = shielded(sealed, x)
    scanned, values = jax.jit(lambda s: lax.scan(lambda c, _: shielded(c, x), s, None, length=2))(
        sealed
    )
    state, plain = start()
    for _ in range(3):
        state, value = jax.jit(step)(state, plain)
    assert_close((enclave.open(scanned), values[-1]), (state, value))


@pytest.mark.parametrize("scheme", [MIXING, SIGNED], ids=["mixing", "signed"])
@pytest.mark.parametrize("devices", [1, 2])
def test_products_and_segments_need_not_wait_for_each_other(
    enclave, monkeypatch, small_mixing, scheme, devices
):
    # A product that does not end before the segments that the enclave was asked for have run: were
    # one of them to wait for it, the program would hang.
    mesh = Mesh(np.array(jax.devices()[:devices]), ("w",)) if devices > 1 else None
    runs: list[HostRun] = []
    beside_products: set[int] = set()
    bring, product = Runtime._bring, Scheme.device_product

    def noting(self: Runtime, run: HostRun, *arguments: Any) -> None:
        runs.append(run)
        bring(self, run, *arguments)

    def waiting(result: np.ndarray) -> list[np.ndarray]:
        for index in sorted(runs[-1]._started if runs else ()):
            runs[-1]._segments[index].result(timeout=30)
            beside_products.add(index)
        return [result]

    def slow(self: Scheme, multiply: Any, *operands: Any) -> Any:
        result = product(self, multiply, *operands)
        (result,) = call(waiting, [jax.ShapeDtypeStruct(result.shape, result.dtype)], result)
        return result

    monkeypatch.setattr(Runtime, "_bring", noting)
    monkeypatch.setattr(Scheme, "device_product", slow)
    shielded = shield(step, enclave=enclave, scheme=scheme, mesh=mesh)
    trained(enclave, shielded)
    late, early = beside(shielded), ahead(shielded)
    assert late and early
    assert beside_products == {*late, *(index - 1 for index in late), *early}


def test_a_wrong_late_product_ends_the_run_before_its_commit(enclave, monkeypatch):
    bring = Runtime._bring
    shielded = shield(step, enclave=enclave, scheme=SIGNED, verify=True)
    state, x = enclave.seal(start())
    state, _ = shielded(state, x)
    wrong = beside(shielded)[-1]

    def lying(self: Runtime, run: HostRun, worker: int, index: int, uploads: Any) -> None:
        uploads = [2 * u for u in uploads] if index == wrong else uploads
        bring(self, run, worker, index, uploads)

    with monkeypatch.context() as patched:
        patched.setattr(Runtime, "_bring", lying)
        with pytest.raises(tempo.errors.IntegrityError):
            shielded(state, x)
    shielded(state, x)  # nothing was committed


@pytest.mark.parametrize("devices", [1, 2])
def test_what_fails_ahead_ends_the_run_before_its_commit(enclave, monkeypatch, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("w",)) if devices > 1 else None
    shielded = shield(step, enclave=enclave, scheme=SIGNED, mesh=mesh)
    state, x = enclave.seal(start())
    state, _ = shielded(state, x)
    request, broken = HostRun._request, ahead(shielded)[1]

    def breaking(self: HostRun, kind: Kind, fields: dict[str, Any], *more: Any) -> Any:
        if kind is Kind.SEGMENT and fields["segment"] == broken:
            raise tempo.errors.EnclaveError("the line broke")
        return request(self, kind, fields, *more)

    with monkeypatch.context() as patched:
        patched.setattr(HostRun, "_request", breaking)
        with pytest.raises(tempo.errors.EnclaveError, match="the line broke"):
            shielded(state, x)
    shielded(state, x)  # nothing was committed


def test_a_visit_that_is_repeated_gets_what_it_got(enclave, monkeypatch):
    # JAX may call again; by then the enclave may have run what goes ahead of the next segment.
    fetch, again = Runtime._fetch, []

    def twice(self: Runtime, run: HostRun, worker: int, index: int) -> Any:
        first = [x.copy() for x in fetch(self, run, worker, index)]
        then = run.served.ahead(index)
        if then is not None:
            run._segments[then].result(timeout=30)
            again.append(then)
        second = fetch(self, run, worker, index)
        jax.tree.map(np.testing.assert_array_equal, first, list(second))
        return second

    monkeypatch.setattr(Runtime, "_fetch", twice)
    shielded = shield(step, enclave=enclave, scheme=SIGNED)
    trained(enclave, shielded)
    assert again == 2 * ahead(shielded) != []


@pytest.mark.parametrize("offload", ["auto", "all"])
def test_small_values_do_not_go_ahead(enclave, as_planned, offload):
    shielded = tempo.shield(step, enclave=enclave, scheme=SIGNED, offload=offload)
    assert not ahead(shielded)


def test_small_late_products_make_no_request_of_their_own(enclave, as_planned):
    shielded = tempo.shield(step, enclave=enclave, scheme=SIGNED)
    few = shielded.explain(*start()).plan.cut
    assert not few.late and not any(s.beside or s.ahead for s in few.segments)


# How long a step takes beside a slow device


def labour(x: jax.Array, share: int) -> jax.Array:
    """The same values, of which the enclave has `share` parts of work."""
    y = lax.fori_loop(0, 400 * share, lambda _, y: jnp.tanh(y + x), x)
    return x + 1e-30 * y


@jax.custom_vjp
def activation(x: jax.Array) -> jax.Array:
    return jnp.tanh(labour(x, 1))


activation.defvjp(
    lambda x: (activation(x), x), lambda x, g: (labour(g, 2) * (1 - jnp.tanh(x) ** 2),)
)


def laborious_step(parameters: Any, x: jax.Array) -> Any:
    """A step in whose layers the enclave works 1 : 2 : 2 before, in and beside the backward pass.

    Before it nothing overlaps, since each layer needs the one before: with many layers and a device
    as slow as the enclave the step takes two thirds of the sum of both at best.
    """

    def loss(parameters: Any) -> jax.Array:
        y = x
        for w in parameters:
            y = activation(y @ w)
        return jnp.mean(y**2)

    value, gradients = jax.value_and_grad(loss)(parameters)
    new = [w - 0.1 * labour(g, 2) for w, g in zip(parameters, gradients, strict=True)]
    return new, tempo.reveal(value)


@pytest.mark.slow  # a ratio of times, which other work on this machine would blur
def test_a_step_takes_less_than_enclave_and_device_one_after_the_other(enclave, monkeypatch):
    nap, device, product = [0.0], threading.Lock(), Scheme.device_product

    def sleeping(result: np.ndarray) -> list[np.ndarray]:
        with device:  # which computes one product at a time
            time.sleep(nap[0])
        return [result]

    def slow(self: Scheme, multiply: Any, *operands: Any) -> Any:
        result = product(self, multiply, *operands)
        (result,) = call(sleeping, [jax.ShapeDtypeStruct(result.shape, result.dtype)], result)
        return result

    monkeypatch.setattr(Scheme, "device_product", slow)
    layers = 16
    parameters = [uniform(i, 64, 64, dtype=jnp.float32) / 4 for i in range(layers)]
    shielded = shield(laborious_step, enclave=enclave, scheme=SIGNED)
    state, x = enclave.seal((parameters, uniform(99, 64, 64, dtype=jnp.float32)))

    def seconds(asleep: float) -> float:
        nonlocal state
        nap[0] = asleep
        start = time.perf_counter()
        state, value = shielded(state, x)
        jax.block_until_ready(value)
        return time.perf_counter() - start

    # The enclave's time is that of a step beside a device that takes none.
    alone = min(seconds(0) for _ in range(3))
    total = alone  # of the device's naps
    ratios = []
    for _ in range(3):  # an attempt on a machine that does something else as well says nothing
        pairs = [(seconds(0), seconds(total / (3 * layers - 1))) for _ in range(5)]
        alone, together = (min(column) for column in zip(*pairs, strict=True))
        ratios.append(together / (alone + total))
        total = alone
        if ratios[-1] <= 0.75:
            break
    assert min(ratios) <= 0.75, f"enclave and device overlap too little: {ratios}"
