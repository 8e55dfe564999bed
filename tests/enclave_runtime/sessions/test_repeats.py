"""A segment asked for again gets its answer for the very bytes it had, and for no others."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from tempo_jax.errors import EnclaveError
from tempo_jax.running.call import Runtime
from tempo_jax.schemes import Mixing, SignedPermutation

RNG = np.random.default_rng(0)
X, W = (RNG.normal(size=size).astype(np.float32) for size in ((128, 64), (64, 96)))
NOTHING, NOT_FINITE = np.zeros_like(X), np.full_like(X, np.nan)


def ask_again(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], None]) -> list[int]:
    """Has the host ask for each segment twice, having changed what it had brought.

    Returns:
      The segments with products that were asked for again, once they were.
    """
    fetch, asked = Runtime._fetch, []

    def twice(self: Any, run: Any, worker: int, index: int) -> Any:
        first = [np.array(array) for array in fetch(self, run, worker, index)]
        uploads = self._program.segments[index].uploads
        for crossing in uploads:
            asked.append(index)
            change(run.arena.view(crossing.blinded, crossing.offset))
        again = fetch(self, run, worker, index)
        assert [a.tobytes() for a in again] == [a.tobytes() for a in first]
        return again

    monkeypatch.setattr(Runtime, "_fetch", twice)
    return asked


def one_bit(view: np.ndarray) -> None:
    view.reshape(-1).view(np.uint8)[-1] ^= 1


def garbage(view: np.ndarray) -> None:
    view[...] = RNG.normal(size=view.shape)


def shielded(enclave: tempo.Enclave, scheme: Any, verify: bool) -> Any:
    return tempo.shield(
        lambda x, w: tempo.reveal(jnp.tanh(x @ w)),
        enclave=enclave,
        scheme=scheme,
        verify=verify,
        offload="all",
        donate=False,
    )


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@pytest.mark.parametrize("change", [one_bit, garbage])
# Where all of x is zero or not a number, the product's value owes nothing to what was brought.
@pytest.mark.parametrize("x", [X, NOTHING, NOT_FINITE], ids=["numbers", "zeros", "nan"])
@pytest.mark.parametrize("scheme", [Mixing(), SignedPermutation()], ids=lambda s: s.name)
def test_other_bytes_are_refused(enclave, monkeypatch, scheme, x, change, verify):
    step = shielded(enclave, scheme, verify)
    asked = ask_again(monkeypatch, change)
    wrong = enclave.statistics()["wrong_products"]
    with pytest.raises(EnclaveError, match="was asked for again with other bytes"):
        step(x, W)
    assert len(asked) == 1
    assert enclave.statistics()["runs"] == 0
    # It learns nothing by which it could tell how to lie.
    assert enclave.statistics()["wrong_products"] == wrong


@pytest.mark.parametrize("x", [X, NOTHING, NOT_FINITE], ids=["numbers", "zeros", "nan"])
@pytest.mark.parametrize("scheme", [Mixing(), SignedPermutation()], ids=lambda s: s.name)
def test_the_same_bytes_are_answered(enclave, monkeypatch, scheme, x):
    asked = ask_again(monkeypatch, lambda view: None)
    found = shielded(enclave, scheme, verify=False)(x, W)
    assert asked
    np.testing.assert_allclose(found, np.tanh(x @ W), rtol=1e-3, atol=1e-3)
