"""What one pool sees of training is uniform, and what two see together is the plaintext.

Statistics are taken over everything of a recording at once, so that there are few of them, and an
honest run exceeds a limit once in ten thousand. All that a pool has beside its shares it computes
from them, which is checked first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import tempo_jax as tempo
from enclave_runtime.crypto.keys import KeySchedule, KeyStream
from enclave_runtime.schemes.kernels.residues import Ring
from tempo_jax.planning.plan import offloaded
from tempo_jax.running.observation import Product
from tempo_jax.schemes import SecretShares
from tests.support.steps import plain_steps, training, uniform
from tests.support.uniformity import correlation, worst

LIMIT = 6.0  # standard deviations, of about 200 statistics
STEPS = 4
SCHEME = SecretShares(insecure_one_pool=True)
RING = Ring(SCHEME.fraction_bits)


def network():
    """A convolution and a layer, on inputs whose rows are far from random."""

    def loss(p: Any, rest: Any, batch: Any):
        x, y = batch
        z = lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        z = jax.nn.relu(z).reshape(x.shape[0], -1) @ p["out"]
        return jnp.mean((z - y) ** 2), (rest, z)

    f32 = jnp.float32
    p = {"conv": uniform(1, 3, 3, 3, 8, dtype=f32), "out": uniform(2, 288, 16, dtype=f32) / 9}
    ramp = jnp.linspace(0, 1, 48 * 6 * 6 * 3, dtype=f32).reshape(48, 6, 6, 3)
    batches = [
        (ramp + 0.1 * uniform(s, *ramp.shape, dtype=f32), ramp[:, 0, :, 0].repeat(3, 1)[:, :16])
        for s in (5, 6)
    ]
    return training(loss, p, batches, optax.adam(1e-2))


@dataclasses.dataclass(frozen=True)
class Seen:
    """One operand of one product: all its shares, and what it is.

    Attributes:
      shares: int8[3, primes, n].
      plain: [n].
      product: of which it is an operand.
    """

    shares: np.ndarray
    plain: np.ndarray
    product: Product


@pytest.fixture(scope="module")
def view():
    """A recording of some steps, with every product's plain operands."""
    case = network()
    batch = case.batches[0]
    with tempo.Enclave.launch() as enclave:
        shielded = tempo.shield(case.step, enclave=enclave, scheme=SCHEME, offload="all")
        plan = shielded.explain(case.state, batch).plan
        _, values = plain_steps(plan, (case.state, batch), STEPS)
        with tempo.testing.host_view() as seen:
            state = enclave.seal(case.state)
            for _ in range(STEPS):
                state, _ = shielded(state, batch)
    eqns = dict(offloaded(plan))
    operands: dict[tuple[int, Any], Seen] = {}
    for product in seen.products:
        for held, v in zip(product.operands, eqns[product.equation].invars, strict=True):
            plain = values[product.step][v].ravel()
            shares = held[:, 0].reshape(3, len(RING.primes), -1)
            operands[product.step, v] = Seen(shares, plain, product)
    return seen, list(operands.values())


def scaled(plain: np.ndarray) -> np.ndarray:
    return plain / (np.abs(plain).max() or 1)


def together(operands: list[Seen], shares: tuple[int, ...]) -> float:
    """The largest statistic of these shares of all operands."""
    seen = np.concatenate([o.shares[list(shares)] for o in operands], axis=2)
    return worst(seen, RING.primes, np.concatenate([scaled(o.plain) for o in operands]))


def test_recording_is_all_of_training(view):
    _, operands = view
    assert len(operands) >= STEPS * 6 and sum(o.plain.size for o in operands) > 100_000
    for seen in operands:  # the three shares are the operand
        whole = RING.integers(seen.shares.sum(0, dtype=np.int16))
        scale = 2.0 ** (SCHEME.fraction_bits - np.frexp(np.abs(seen.plain).max())[1])
        np.testing.assert_allclose(whole / scale, seen.plain, atol=1e-4 * np.abs(seen.plain).max())


@pytest.mark.parametrize("pool", range(3))
def test_one_pools_view_is_uniform(view, pool):
    _, operands = view
    assert together(operands, (pool, (pool + 1) % 3)) < LIMIT


def test_two_pools_views_are_not(view):
    _, operands = view
    assert together(operands, (0, 1, 2)) > 10 * LIMIT


@pytest.mark.parametrize("pool", range(3))
def test_a_pool_has_nothing_but_its_shares_and_what_it_computes_of_them(view, pool):
    seen, _ = view
    own = seen.pools[pool]
    for product in own.products:
        x, w = (jnp.asarray(o.astype(np.int64)) for o in product.operands)
        params = {**product.params, "precision": None, "preferred_element_type": None}

        def multiply(one: Any, other: Any, product: Product = product, params: Any = params) -> Any:
            return product.primitive.bind(one, other, **params)

        for number, prime in enumerate(RING.primes):
            (a, b), (c, d) = x[:, number], w[:, number]
            expected = np.asarray(multiply(a, c + d) + multiply(b, c))
            assert not ((expected - product.result[number]) % prime).any()
    held = {o.tobytes() for p in own.products for o in p.operands}
    held |= {p.result.tobytes() for p in own.products}
    others = [a for _, a in own.crossings if a.tobytes() not in held]
    assert all(a.dtype != np.int8 for a in others)  # but what is in the clear for everyone
    assert len(others) == len(own.revealed)


def test_shares_of_different_tensors_have_nothing_in_common(view):
    _, operands = view
    size = 1000
    parts = np.stack([o.shares[:2, :, :size] for o in operands if o.plain.size >= size])
    flat = parts.reshape(-1, len(RING.primes), size).astype(np.float64)
    pairs = 0
    for number in range(len(RING.primes)):
        found = np.atleast_2d(np.corrcoef(flat[:, number]))
        off = found[np.triu_indices(len(found), 1)] * np.sqrt(size)
        pairs += off.size
        assert np.abs(off).max() < LIMIT
        assert abs(np.square(off).mean() - 1) < LIMIT * np.sqrt(2 / off.size)
    assert pairs > 1000


# Whole batches, spectra and subspaces: where blinding over the reals shows something


def matrix(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """One pool's share as integers of the ring, over its modulus, and the plain operand."""
    share = RING.integers(seen.shares[0]) / np.prod(np.array(RING.primes, np.float64))
    return share.reshape(-1, 48), seen.plain.reshape(-1, 48)


def largest(operands: list[Seen]) -> list[Seen]:
    return [o for o in operands if o.plain.size % 48 == 0 and o.plain.size >= 48 * 96]


def test_spectra_are_those_of_noise(view):
    _, operands = view
    rng, steeper = np.random.default_rng(0), []
    for seen in largest(operands):
        share, plain = matrix(seen)
        noise = np.array(
            [
                np.linalg.svd(rng.uniform(-0.5, 0.5, share.shape), compute_uv=False)
                for _ in range(20)
            ]
        )
        own = np.linalg.svd(share, compute_uv=False)
        off = (own - noise.mean(0)) / noise.std(0, ddof=1)
        assert np.abs(off).max() < 2 * LIMIT  # the deviation is itself estimated from 20
        plain_spectrum = np.linalg.svd(plain, compute_uv=False)
        steeper.append(plain_spectrum[0] / plain_spectrum[8] > 3 * own[0] / own[8])
    assert any(steeper)  # there was something to see


def test_subspaces_are_not_shown(view):
    _, operands = view
    overlaps = []
    for seen in largest(operands):
        share, plain = matrix(seen)
        first, second = (np.linalg.svd(x)[2][:4] for x in (share, plain))
        overlaps.append(np.square(first @ second.T).sum() / 4)
    chance = 4 / 48
    assert len(overlaps) > 8
    assert abs(np.mean(overlaps) - chance) < LIMIT * 0.04 / np.sqrt(len(overlaps))


def test_whole_batches_are_told_at_chance(view):
    """By correlation and by Gram matrix, against others of the same elements and sizes."""
    _, operands = view
    rng, right, count = np.random.default_rng(1), np.zeros(2), 0

    def scores(share: np.ndarray, guess: np.ndarray) -> np.ndarray:
        grams = (x @ x.T for x in (share, guess))
        return np.array([correlation(share, guess), correlation(*grams)])

    for seen in largest(operands):
        share, plain = matrix(seen)
        mine = scores(share, plain)
        assert np.abs(mine[0]) < LIMIT
        for _ in range(4):
            guess = plain[rng.permutation(len(plain))] * rng.choice([-1, 1], plain.shape)
            right += mine > scores(share, guess)
            count += 1
    # Guesses at one batch share its score.
    assert (np.abs(right / count - 0.5) < LIMIT * 0.5 / np.sqrt(count / 4)).all()


# The same statistics on masks that are wrong


def halved(stream: KeyStream, honest: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Seven bits instead of eight."""
    return honest // 2


def repeated(stream: KeyStream, honest: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """One share is the other."""
    return np.stack([honest[0], honest[0]])


def serial(stream: KeyStream, honest: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Every fiftieth residue is the one before."""
    changed = honest.copy()
    changed[..., 1::50] = changed[..., 0:-1:50][..., : changed[..., 1::50].shape[-1]]
    return changed


def planted(stream: KeyStream, honest: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """One in twenty is drawn again where its sign differs from the plaintext's."""
    changed = honest.copy()
    again = (plain < 0) & (np.arange(plain.size) % 20 == 0)
    changed[..., again] = -np.abs(changed[..., again])
    return changed


def modulo(stream: KeyStream, honest: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """A byte modulo the prime, without rejection."""
    drawn = stream.words(honest.size // 8 + 1).view(np.uint8)[: honest.size].reshape(honest.shape)
    primes = np.array(RING.primes, np.uint8)[:, None]
    return (drawn % primes - primes // 2).view(np.int8)


def none_wrong(stream: KeyStream, honest: np.ndarray, plain: np.ndarray) -> np.ndarray:
    return honest


@pytest.mark.parametrize("wrong", [none_wrong, halved, repeated, serial, planted, modulo])
def test_a_wrong_mask_is_noticed(monkeypatch, wrong: Callable[..., np.ndarray]):
    plain = np.sin(np.arange(200_000) / 300)
    honest = KeyStream.residues
    monkeypatch.setattr(
        KeyStream,
        "residues",
        lambda stream, *sizes: wrong(stream, honest(stream, *sizes), plain),
    )
    shares = RING.split(np.rint(plain * 2**22), KeySchedule().stream("test", 1))
    found = worst(shares[0], RING.primes, plain)
    assert found < LIMIT if wrong is none_wrong else found > LIMIT
