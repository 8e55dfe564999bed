"""Workers never wait for each other inside a visit: devices × bytes × cores, as a user's program.

Above about 100 KB the arguments of a `jax.pure_callback` wait for a thread of XLA's pool, which
smaller shapes do not show; a mesh then hung for ever.
"""

import concurrent.futures
import itertools
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

import tempo_jax as tempo
from tempo_jax.running import watchdog
from tempo_jax.running.call import Runtime
from tempo_jax.schemes import Mixing, SignedPermutation
from tests.support.fresh import run_fresh

WIDTH = 256
KILOBYTE = 1 << 10


def chain(x, weights):
    for w in weights:
        x = jnp.tanh(x @ w)
    return tempo.reveal(x)


def operands(rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 16 for _ in range(3)]
    return rng.standard_normal((rows, WIDTH)).astype(np.float32), weights


def shielded_chain(enclave, scheme):
    mesh = Mesh(np.array(jax.devices()), ("workers",))
    return tempo.shield(
        chain, enclave=enclave, scheme=scheme, offload="all", mesh=mesh, donate=False
    )


def products_of_sizes() -> None:
    """Every size of the environment's list, under both kinds of scheme."""
    sizes = json.loads(os.environ["TEMPO_TEST_SHARDS"])
    with tempo.Enclave.launch() as enclave:
        for kilobytes, scheme in itertools.product(sizes, (SignedPermutation(), Mixing())):
            rows = kilobytes * KILOBYTE // (4 * WIDTH) * len(jax.devices())
            x, weights = operands(rows)
            out = shielded_chain(enclave, scheme)(x, weights)
            np.testing.assert_allclose(out, jax.jit(chain)(x, weights), atol=2e-3)


def inside_jit_and_scan_and_several_at_once() -> None:
    with tempo.Enclave.launch() as enclave:
        x, weights = operands(512)
        shielded, sealed = shielded_chain(enclave, SignedPermutation()), enclave.seal((x, weights))
        plain = np.asarray(jax.jit(chain)(x, weights))
        np.testing.assert_allclose(jax.jit(shielded)(*sealed), plain, atol=1e-4)

        def steps(sealed):
            return lax.scan(lambda total, _: (total + shielded(*sealed), None), 0 * plain, None, 2)

        np.testing.assert_allclose(jax.jit(steps)(sealed)[0], 2 * plain, atol=1e-4)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for out in pool.map(lambda _: shielded(*sealed), range(8)):
                np.testing.assert_allclose(out, plain, atol=1e-4)


def a_worker_that_does_not_come() -> None:
    """The error names it, in time; what it was doing may end later."""
    watchdog.WORKER_SECONDS = 1.0
    bring, stuck = Runtime._bring, threading.Event()

    def late(self, run, worker, index, uploads):
        if (worker, index) == (1, 1):
            stuck.wait(60)
        return bring(self, run, worker, index, uploads)

    with tempo.Enclave.launch() as enclave:
        x, weights = operands(512)
        shielded = shielded_chain(enclave, SignedPermutation())
        shielded(x, weights)
        Runtime._bring = late
        try:
            with pytest.raises(tempo.errors.EnclaveError, match="worker 1 of the mesh did not"):
                shielded(x, weights)
        finally:
            stuck.set()
            Runtime._bring = bring
        np.testing.assert_allclose(shielded(x, weights), jax.jit(chain)(x, weights), atol=1e-4)


def sweep(monkeypatch, sizes: list[int], devices: int, cores: int | None) -> None:
    monkeypatch.setenv("TEMPO_TEST_SHARDS", json.dumps(sizes))
    run_fresh(products_of_sizes, devices=devices, cores=cores)


def test_no_size_hangs(monkeypatch):
    sweep(monkeypatch, [64, 256, 2048], devices=2, cores=1)


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_no_size_hangs_on_any_number_of_devices(monkeypatch, devices, cores):
    sweep(monkeypatch, [64, 1024, 16384 // devices], devices=devices, cores=cores)


def test_no_hang_inside_jit_and_scan_and_in_several_calls():
    run_fresh(inside_jit_and_scan_and_several_at_once, devices=4)


def test_missing_worker_is_named():
    run_fresh(a_worker_that_does_not_come, devices=2)
