"""Three pools of devices under secret shares: right results, and each sees its own shares alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh

import tempo_jax as tempo
from tempo_jax.errors import EnclaveError, UnsupportedError
from tempo_jax.planning.plan import offloaded
from tempo_jax.running.call import Runtime
from tempo_jax.schemes import SecretShares
from tests.support.steps import assert_trains_alike, training, uniform

ONE_DEVICE = SecretShares(insecure_one_pool=True)
FLOAT32_STEPS = 1e-5


def pools() -> Mesh:
    return Mesh(np.array(jax.devices()[:3]), ("pools",))


def network(dtype: Any = jnp.float64):
    """A convolution, attention between its rows, and a layer; AdamW."""

    def loss(p: Any, rest: Any, batch: Any):
        x, y = batch
        z = lax.conv_general_dilated(
            x, p["conv"], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        z = jax.nn.gelu(z).reshape(x.shape[0], -1, 6)
        scores = jax.nn.softmax(jnp.einsum("bik,bjk->bij", z, z @ p["keys"]))
        z = jnp.einsum("bij,bjk->bik", scores, z).mean(1) @ p["out"]
        return jnp.mean((z - y) ** 2), (rest, z)

    shapes = {"conv": (3, 3, 2, 6), "keys": (6, 6), "out": (6, 3)}
    p = {k: uniform(i, *s, dtype=dtype) for i, (k, s) in enumerate(shapes.items())}
    batches = [
        (uniform(seed, 4, 4, 4, 2, dtype=dtype), uniform(seed + 1, 4, 3, dtype=dtype))
        for seed in (7, 9)
    ]
    return training(loss, p, batches, optax.adamw(1e-2))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mesh", [False, True], ids=["one device", "three pools"])
def test_step_equals_the_plain_one(enclave, mesh, dtype, verify):
    case = network(dtype)
    options: dict[str, Any] = {"scheme": ONE_DEVICE}
    if mesh:
        options = {"scheme": SecretShares(), "mesh": pools()}
    shielded = tempo.shield(case.step, enclave=enclave, offload="all", verify=verify, **options)
    tolerance = 1e-10 if dtype == "float64" else FLOAT32_STEPS
    assert_trains_alike(shielded, enclave, case, tolerance)
    report = shielded.explain(case.state, case.batches[0])
    assert not report.resident  # optimizers run in the enclave
    assert len(offloaded(report.plan)) >= 12  # forward and backward, convolution and batches
    assert ("devices alone" if mesh else "nothing is hidden") in str(report)
    assert ("2^-22" in str(report)) == verify


def test_three_pools_in_the_users_own_jit(enclave):
    case = network("float32")
    shielded = tempo.shield(
        case.step, enclave=enclave, offload="all", scheme=SecretShares(), mesh=pools()
    )
    state, _ = jax.jit(shielded)(enclave.seal(case.state), enclave.seal(case.batches[0]))
    expected, _ = jax.jit(case.step)(case.state, case.batches[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=FLOAT32_STEPS, atol=FLOAT32_STEPS),
        enclave.open(state)["params"],
        expected["params"],
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("verify", [False, True])
def test_what_is_not_finite_is_as_in_plain_jax(enclave, value, verify):
    x, w = uniform(1, 5, 6).at[1, 2].set(value), uniform(2, 6, 4)
    shielded = tempo.shield(
        jnp.matmul, enclave=enclave, offload="all", scheme=ONE_DEVICE, verify=verify
    )
    np.testing.assert_allclose(enclave.open(shielded(x, w)), x @ w, rtol=1e-10)


# Who sees what


def test_each_pool_sees_its_shares_alone(enclave):
    case = network("float32")
    shielded = tempo.shield(
        case.step, enclave=enclave, offload="all", scheme=SecretShares(), mesh=pools()
    )
    with tempo.testing.host_view() as view:
        shielded(case.state, case.batches[0])
    assert len(view.pools) == 3
    for product, *parts in zip(view.products, *(p.products for p in view.pools), strict=True):
        for which in range(2):
            held = [part.operands[which] for part in parts]
            np.testing.assert_array_equal(np.stack(held), product.operands[which])
            for number in range(3):  # its second share is the next pool's first
                np.testing.assert_array_equal(held[number][1], held[(number + 1) % 3][0])
    for pool in view.pools:
        assert pool.revealed == view.revealed and not pool.leaves
        assert {a.dtype for _, a in pool.crossings if a.ndim} == {np.dtype(np.int8)}


def test_devices_hold_their_own_pools_shares(enclave):
    """The compiled program splits what crosses along the first axis, and gathers nothing."""
    case = network("float32")
    shielded = tempo.shield(
        case.step, enclave=enclave, offload="all", scheme=SecretShares(), mesh=pools()
    )
    shielded(case.state, case.batches[0])
    runtime = _runtime(shielded, case)
    text = runtime._host_program(False).as_text()
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text
    for result in ("s32[] all-reduce(", "s32[]{:T(128)} all-reduce("):
        text = text.replace(result, "")
    assert "all-reduce(" not in text  # but the token's
    whole = {f"s8[3,2,{n}" for n in (8, 14)} | {f"s8[3,{n}" for n in (8, 14)}
    assert not [shape for shape in whole if shape in text]


def _runtime(shielded: Any, case: Any) -> Runtime:
    signature = shielded._signature((case.state, case.batches[0]), {})
    return shielded._program(signature).runtime


def test_masks_are_never_used_again(enclave, monkeypatch):
    """Not in another product, not in the next step, and not after a run that was aborted."""
    case = network("float32")
    shielded = tempo.shield(case.step, enclave=enclave, offload="all", scheme=ONE_DEVICE)
    with tempo.testing.host_view() as view:
        shielded(case.state, case.batches[0])

        def interrupted(*_: Any) -> Any:
            raise EnclaveError("on purpose")

        with monkeypatch.context() as patch:
            patch.setattr("tempo_jax.running.host_run.HostRun.commit", interrupted)
            with pytest.raises(EnclaveError, match="on purpose"):
                shielded(case.state, case.batches[0])
        shielded(case.state, case.batches[0])
    seen: set[bytes] = set()
    count = 0
    for _, array in view.crossings:
        if array.dtype == np.int8 and array.ndim > 4:
            for share in (array[0, 0], array[1, 0], array[2, 0]):
                if share.size >= 64:
                    seen.add(share.tobytes())
                    count += 1
    assert count > 100 and len(seen) == count


# Refusals


def test_without_pools_it_is_refused(enclave):
    with pytest.raises(UnsupportedError, match="insecure_one_pool=True"):
        tempo.shield(jnp.matmul, enclave=enclave, scheme=SecretShares())
    for mesh in (
        Mesh(np.array(jax.devices()[:3]), ("workers",)),
        Mesh(np.array(jax.devices()[:2]), ("pools",)),
        Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("pools", "data")),
    ):
        with pytest.raises(UnsupportedError, match='one axis "pools", and this one has'):
            tempo.shield(jnp.matmul, enclave=enclave, scheme=ONE_DEVICE, mesh=mesh)
    inside = tempo.shield(jnp.matmul, enclave=enclave, scheme=SecretShares(), placement="enclave")
    x = uniform(1, 3, 3)
    np.testing.assert_allclose(enclave.open(inside(x, x)), x @ x, rtol=1e-12)


def test_sum_that_may_overflow_stays_inside(enclave):
    x = jax.ShapeDtypeStruct((2, 140_000), jnp.float32)
    y = jax.ShapeDtypeStruct((140_000, 2), jnp.float32)
    shielded = tempo.shield(jnp.matmul, enclave=enclave, offload="all", scheme=ONE_DEVICE)
    report = shielded.explain(x, y)
    assert not offloaded(report.plan) and "may overflow the ring" in str(report)


def test_enclave_refuses_a_program_whose_sums_may_overflow(enclave, monkeypatch):
    """Whatever the planner says."""
    x = uniform(1, 2, 140_000, dtype=jnp.float32)
    shielded = tempo.shield(jnp.matmul, enclave=enclave, offload="all", scheme=ONE_DEVICE)
    monkeypatch.setattr(SecretShares, "refuses", lambda *_: None)
    with pytest.raises(EnclaveError, match="140000 terms, and more than"):
        shielded(x, x.T)


@pytest.mark.parametrize("prime", range(8))
def test_one_wrong_residue_of_one_pool_is_noticed(enclave, monkeypatch, prime):
    honest = SecretShares.device_product

    def lying(self: Any, product: Any, lhs: Any, rhs: Any) -> Any:
        part = honest(self, product, lhs, rhs)
        return part.at[1, prime, 0, 0].add(1)

    monkeypatch.setattr(SecretShares, "device_product", lying)
    x = uniform(1, 5, 6, dtype=jnp.float32)
    shielded = tempo.shield(
        jnp.matmul, enclave=enclave, offload="all", scheme=ONE_DEVICE, verify=True
    )
    with pytest.raises(tempo.errors.TempoError, match="returned a wrong product"):
        shielded(x, x.T)


def test_scheme_is_described_by_its_fields():
    assert dataclasses.asdict(SecretShares()) == SecretShares().parameters
