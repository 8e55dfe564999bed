"""Every byte that crosses to the host over a training run, held against everything secret.

`boundary` records it and `plaintext_search` says what is looked for; the plaintext is that of a
plain run of the same steps. The same recording with a scheme of permutations, or of a step that
reveals an operand, must find it: otherwise finding nothing would mean nothing.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.crypto.encryption import derive_key
from enclave_runtime.protocol.wire import Kind
from tempo_jax.cli.serve import served
from tempo_jax.jaxprs import opaque
from tempo_jax.jaxprs.products import is_product
from tempo_jax.transport import child as child_module
from tempo_jax.transport.child import Connection
from tests.support.boundary import Boundary, open_command, recording
from tests.support.plaintext_search import Finding, Search
from tests.support.serving import sealed_for
from tests.support.steps import assert_close, plain_steps, uniform

pytestmark = pytest.mark.slow

STEPS = 3
WIDTH, CLASSES, BATCH = 64, 10, 128
X = uniform(1, BATCH, WIDTH)
Y = jnp.asarray(np.random.default_rng(2).integers(0, CLASSES, BATCH))
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ROOT, SECRET, IDENTITY, CHECKPOINTS = (bytes([n]) + os.urandom(31) for n in range(4))


def loss_of(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """A classifier of two hidden layers, whose products are large enough to go out."""
    h = jax.nn.relu(x @ p["a"] + p["bias"])
    logits = jnp.tanh(h @ p["b"]) @ p["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
    """A training step; the loss is revealed."""
    loss, grads = jax.value_and_grad(loss_of)(state[0], x, y)
    updates, moments = OPTIMIZER.update(grads, state[1], state[0])
    return (optax.apply_updates(state[0], updates), moments), tempo.reveal(loss)


def initial() -> Any:
    p = {n: 0.3 * uniform(i, WIDTH, WIDTH) for i, n in enumerate("ab", 3)}
    p |= {"c": 0.3 * uniform(5, WIDTH, CLASSES), "bias": 0.1 * uniform(6, WIDTH)}
    return p, jax.tree.map(lambda v: v + 0.01 * uniform(7, *v.shape), OPTIMIZER.init(p))


def plaintext(plan: Any, arguments: Any, steps: int) -> dict[str, np.ndarray]:
    """Operands l, r and results o of every product; all that goes in, and out but the loss."""
    _, values = plain_steps(plan, arguments, steps)
    plain: dict[str, np.ndarray] = {}
    public = {plan.jaxpr.outvars[i] for i in plan.revealed}
    for number, seen in enumerate(values):
        for i, v in enumerate([*plan.jaxpr.constvars, *plan.jaxpr.invars]):
            plain[f"{number}: input {i}"] = seen[v]
        for i, v in enumerate(plan.jaxpr.outvars):
            if v not in public:
                plain[f"{number}: output {i}"] = seen[v]
        for e, eqn in enumerate(plan.jaxpr.eqns):
            if is_product(eqn):
                for name, v in zip(
                    ("left", "right", "result"), (*eqn.invars, *eqn.outvars), strict=True
                ):
                    plain[f"{number}: {name} of product {e}"] = seen[v]
    return plain


def stream_keys(runs: int) -> dict[str, bytes]:
    """What the enclave derives from its root for the first runs; see `run`."""
    uses = ["test"]
    for purpose in ("class", "tensor", "port", "check"):
        uses += [f"{purpose}/{r}/{n}" for r in range(1, runs + 1) for n in range(120)]
    return {f"stream {use}": derive_key(ROOT, use) for use in uses}


@dataclasses.dataclass(repr=False)
class Recording:
    """One run's bytes and what must not be among them.

    Attributes:
      seen: by where they crossed.
      plain: plaintext by name.
      secrets: keys by name.
    """

    seen: dict[str, bytes]
    plain: dict[str, np.ndarray]
    secrets: dict[str, bytes]

    @functools.cached_property
    def findings(self) -> dict[str, list[Finding]]:
        """What is found, by where."""
        search = Search(self.plain, self.secrets)
        found = {where: search.findings(content) for where, content in self.seen.items()}
        return {where: findings for where, findings in found.items() if findings}


@contextlib.contextmanager
def launched(boundary: Boundary, folder: Path) -> Iterator[tuple[Any, Any, dict[str, bytes]]]:
    """Client and host in one process; yields the client, the host and their keys."""
    errors = folder / "errors"
    # Only to know it; a real one is drawn.
    with mock.patch.object(child_module.secrets, "token_bytes", lambda _: SECRET):
        connection = Connection(open_command(ROOT, errors))
    connection.port = boundary.proxy(connection.port, "socket")
    with standard_output(boundary, connection._child, errors), tempo.Enclave(connection) as enclave:
        yield enclave, enclave, {"session": SECRET}
        boundary.check_nothing_else(connection.process.pid, errors)


@contextlib.contextmanager
def serving(boundary: Boundary, folder: Path) -> Iterator[tuple[Any, Any, dict[str, bytes]]]:
    """A client over TLS, and a host."""
    errors = folder / "errors"
    with served(host_key=folder / "key", command=open_command(ROOT, errors)) as ports:
        outside, inside = (int(a.rpartition(":")[2]) for a in (ports.client, ports.host))
        near = [boundary.proxy(outside, "tls"), boundary.proxy(inside, "socket")]
        policy = tempo.AttestationPolicy(insecure_accept_no_sgx=True)
        identity = tempo.ClientIdentity(IDENTITY)
        with (
            standard_output(boundary, ports.child, errors),
            tempo.Enclave.connect(f"127.0.0.1:{near[0]}", policy=policy, identity=identity) as c,
            tempo.Enclave.attach(f"127.0.0.1:{near[1]}", host_key=ports.host_key) as host,
        ):
            yield c, host, {"identity": IDENTITY}
            boundary.check_nothing_else(ports.child.process.pid, errors)


@contextlib.contextmanager
def standard_output(boundary: Boundary, child: Any, errors: Path) -> Iterator[None]:
    """Records what the process writes to its output and to its log, to the last byte."""
    stdout = child.process.stdout
    boundary.record("output", " ".join(child.greeting).encode())
    copy = os.dup(stdout.fileno())
    yield
    child.stop()
    with open(copy, "rb") as rest:
        boundary.record("output", rest.read())
    boundary.record("log", errors.read_bytes())


def record(
    folder: Path,
    side: Callable[..., Any] = launched,
    scheme: Any = None,
    function: Callable[..., Any] = step,
    steps: int = STEPS,
) -> Recording:
    """Trains under observation, with a refused request, a checkpoint and a restore."""
    options = {"scheme": scheme, "offload": "all", "donate": False}
    arguments = (initial(), X, Y)
    with recording() as boundary, side(boundary, folder) as (client, host, secrets):
        owned = tempo.shield(function, enclave=client, **options)
        plan = owned.explain(*arguments).plan
        if client is not host:
            owned.provision(*arguments, runs_per_batch=steps)
        shielded = tempo.shield(function, enclave=host, **options)
        key = tempo.CheckpointKey.from_bytes(CHECKPOINTS)
        client.use_checkpoint_key(key)
        state, x, y = sealed_for(client, state=arguments[0], x=X, y=Y)
        keep(boundary, "sealed inputs", (state, x, y))
        with tempo.testing.host_view() as view:
            for _ in range(steps):
                state, revealed = shielded(state, x, y)
                keep(boundary, "sealed outputs", state)
                keep(boundary, "revealed", revealed)
        # What the host multiplies, and gets; much of it crosses as it is, and is there once.
        for content in {np.asarray(array).tobytes(): None for array in view.arrays()}:
            boundary.record("devices", content)
        data = host.checkpoint(state)
        boundary.record("checkpoint", data)
        order = None if client is host else client.restore_order(initial())
        restored = host.restore(data, initial(), order=order)
        keep(boundary, "restored", restored)
        with pytest.raises(tempo.errors.TempoError):
            host.connection.request(Kind.SEGMENT, {"run": 0, "segment": 0})
        host.statistics()
        expected, plain_step = initial(), jax.jit(function)
        for _ in range(steps):
            expected, _ = plain_step(expected, X, Y)
        # Blinded leaves come to a client in a file only, so what was restored is opened.
        assert_close(client.open(restored), expected, 1e-9)
        session = client.connection.keys
        secrets |= session._asdict() | {"root": ROOT, "checkpoint": CHECKPOINTS}
    boundary.picture()
    seen = {where: boundary.joined(where) for where in boundary.recorded}
    secrets |= stream_keys(steps)
    return Recording(seen, plaintext(plan, arguments, steps), secrets)


def keep(boundary: Boundary, where: str, tree: Any) -> None:
    """Records what the host keeps of a value: its content, and its handle."""
    for leaf in jax.tree.leaves(tree):  # a sealed array's children are leaves
        boundary.record(where, np.asarray(opaque.words_of(leaf)).tobytes())


@pytest.mark.parametrize("side", [launched, serving])
def test_nothing_secret_is_among_the_bytes_that_cross(side, tmp_path):
    run = record(tmp_path, side)
    sizes = {where: len(content) for where, content in run.seen.items()}
    # It recorded what it is meant to: 3 steps of products of (192, 64) and (64, 64) of float64.
    assert sizes["shared memory"] > STEPS * 8 * 192 * 64 * 8
    assert sizes["devices"] and sizes["sealed inputs"] and sizes["checkpoint"]
    assert any(n.startswith("socket") for n in sizes)
    assert any(n.startswith("tls") for n in sizes) == (side is serving)
    assert not run.findings


# The controls


def kinds(run: Recording, where: str = "shared memory") -> set[str]:
    return {finding.how for finding in run.findings.get(where, ())}


def test_permutations_are_found(tmp_path):
    run = record(tmp_path, scheme=tempo.schemes.SignedPermutation(), steps=1)
    assert "permuted" in kinds(run) and "permuted" in kinds(run, "devices")
    found = {f.name for f in run.findings["shared memory"] if f.how == "permuted"}
    # Of every product that goes out, the operands and the result.
    products = {n for n in run.plain if "product" in n and np.ndim(run.plain[n]) == 2}
    assert len(found & products) > len(products) / 2


@pytest.mark.parametrize(("factor", "how"), [(1, "copy"), (2, "scaled")])
def test_a_revealed_operand_is_found(factor, how, tmp_path):
    def revealing(state, x, y):
        new, loss = step(state, x, y)
        return new, tempo.reveal((loss, factor * jax.nn.relu(x @ state[0]["a"])))

    run = record(tmp_path, function=revealing, steps=1)
    for where in ("shared memory", "revealed"):
        assert how in kinds(run, where)
        assert ("copy" in kinds(run, where)) == (factor == 1)


def test_a_planted_key_is_found(tmp_path):
    run = record(tmp_path, steps=1)
    (socket,) = [where for where in run.seen if where.startswith("socket 0 out")]
    for name, key in run.secrets.items():
        run.seen[socket] += key.hex().encode() if "stream" in name else key
    found = {f.name for f in run.findings[socket]}
    assert found == set(run.secrets)
