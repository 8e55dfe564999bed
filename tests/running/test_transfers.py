"""A segment goes over in one message, its arrays once each, and no operand is blinded once more.

Under keys per product every family has keys of its own, so an operand is blinded once for a product
and its gradients, their G once for each of its two products, and fused products share theirs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tempo_jax as tempo
from enclave_runtime.protocol.wire import Kind
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs.callbacks import call_p
from tempo_jax.running.host_run import HostRun
from tempo_jax.schemes import Mixing
from tests.support.steps import uniform
from tests.support.workers import mesh_of


def layers(p: Any, x: jax.Array) -> jax.Array:
    """The loss of four layers, of which the last stays inside."""
    h = jnp.tanh(x @ p["a"])
    h = jnp.tanh(h @ p["b"])
    return jnp.square(jnp.tanh(h @ p["c"]) @ p["d"]).mean()


def heads(p: Any, x: jax.Array) -> jax.Array:
    """Three products of one activation, which are fused."""
    x = jnp.tanh(x @ p["d"])
    a, b, c = (jnp.tanh(x @ p[name]) for name in "abc")
    return jnp.square((a * b + c) @ p["e"]).mean()


def images(p: Any, x: jax.Array) -> jax.Array:
    """Two convolutions, which are sent as products of matrices."""
    x = x.reshape(2, 8, 8, 64)
    for name in "ab":
        kernel = p[name].reshape(1, 1, 64, 64) * jnp.ones((3, 3, 1, 1))
        x = jnp.tanh(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **SPEC))
    return jnp.square(x.reshape(-1, 64) @ p["c"]).mean()


SPEC: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
CASES = {"layers": layers, "heads": heads, "images": images}
each_case = pytest.mark.parametrize("loss", CASES.values(), ids=CASES)


def arguments() -> tuple[Any, jax.Array]:
    return {n: uniform(i, 64, 64) for i, n in enumerate("abcde")}, uniform(7, 128, 64)


def shielded(enclave: tempo.Enclave, loss: Callable[..., Any], **options: Any) -> Any:
    return tempo.shield(
        jax.grad(loss), enclave=enclave, scheme=Mixing(), offload="all", donate=False, **options
    )


@each_case
def test_an_operand_is_blinded_once(enclave, loss):
    step = shielded(enclave, loss)
    program = step.explain(*arguments()).plan.program
    sent = [c.value for s in program.segments for c in s.downloads if c.layout.keyed]
    products = [c for s in program.segments for c in s.uploads if c.layout.keyed]
    assert max(Counter(sent).values()) == 1
    operands = [set(c.operands) for c in products]
    assert {v for pair in operands for v in pair} == set(sent), "what nobody multiplies was sent"
    # A product and its gradients are three pairs of the same four values, never of six.
    shared = Counter(v for pair in operands for v in pair)
    whole = [pair for pair in operands if all(shared[v] == 2 for v in pair)]
    assert whole, "a family with both gradients"
    for pair in whole:
        others = [other for other in operands if other != pair and other & pair]
        assert len(others) == 2 and len(set.union(pair, *others)) == 4
    before = enclave.statistics()["blindings"]
    step(*arguments())
    assert enclave.statistics()["blindings"] - before == len(sent)


def test_fused_products_share_an_operand(enclave):
    program = shielded(enclave, heads).explain(*arguments()).plan.program
    wide = [
        c.blinded.shape
        for s in program.segments
        for c in s.downloads
        if c.layout.keyed and 192 in c.blinded.shape
    ]
    # The three weights beside each other, and their G for dX and for dW; of X there is one.
    assert sorted(wide) == [(64, 192), (128, 192), (128, 192)]


@each_case
@pytest.mark.parametrize("workers", [1, 2])
def test_a_segment_is_one_message(enclave, loss, workers, monkeypatch):
    mesh = mesh_of(workers) if workers > 1 else None
    step = shielded(enclave, loss, mesh=mesh)
    report, given = step.explain(*arguments()), enclave.seal(arguments())
    step(*given)  # provisions the program
    asked: list[tuple[Kind, Any]] = []
    request = HostRun._request

    def counted(self: Any, kind: Kind, fields: dict[str, Any], *more: Any) -> Any:
        asked.append((kind, fields.get("segment")))
        return request(self, kind, fields, *more)

    monkeypatch.setattr(HostRun, "_request", counted)
    step(*given)
    segments = [(Kind.SEGMENT, index) for index in range(report.round_trips)]
    assert asked == [*segments, (Kind.COMMIT, None)], "whatever the workers, in order, once each"
    # JAX calls back with all arrays of a visit at once: at most to bring, and to fetch.
    program = jax.make_jaxpr(step)(*given)
    visits = [e for e in equations.equations(program.jaxpr) if e.primitive is call_p]
    assert len(visits) <= 2 * (report.round_trips + 2), "begin and commit are visits too"


@each_case
def test_arrays_are_copied_once(enclave, loss, monkeypatch):
    """Into shared memory where they go up; what comes down JAX reads where it lies."""
    step = shielded(enclave, loss)
    report, given = step.explain(*arguments()), enclave.seal(arguments())
    step(*given)
    copied: list[int] = []
    lent: list[bool] = []
    bring, fetch, copyto = HostRun.bring, HostRun.fetch, np.copyto

    def fetched(self: HostRun, worker: int, index: int) -> list[np.ndarray]:
        downloads = fetch(self, worker, index)
        crossings = self.served.program.segments[index].downloads
        for c, array in zip(crossings, downloads, strict=True):
            lent.append(np.shares_memory(array, self.arena.view(c.blinded, c.offset)))
        return downloads

    def noted(into: np.ndarray, array: np.ndarray) -> None:
        copied.append(into.nbytes)
        copyto(into, array)

    def brought(self: HostRun, *given: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("tempo_jax.running.host_run.np.copyto", noted)
            bring(self, *given)

    traffic = step.traffic(*arguments())
    up, down = traffic.up, traffic.down
    monkeypatch.setattr(HostRun, "fetch", fetched)
    monkeypatch.setattr(HostRun, "bring", brought)
    step(*given)
    monkeypatch.undo()
    assert lent and all(lent)
    assert sum(copied) == report.bytes_up == traffic.up - up
    assert traffic.down - down == report.bytes_down
