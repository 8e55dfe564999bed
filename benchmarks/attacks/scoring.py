"""Scores attacks against the truth: columns linked, directions linked, stolen accuracy.

An attack hands over what it believes of the host's own coordinates; only these functions read the
keys. "Stolen" is the test accuracy of the victim with the second of two adjacent products fed by
the attacker's guess; the keys of the first's input and of the second's output, and everything
else of the model, are given away. That isolates whether the attacker can link layers.

The second of two convolutions takes nine neighbouring pixels; pairs of rows do not say which rows
are neighbours, so that a guess is made from the pixel in the middle, or from the mean of the nine.
A residual model works without the link as well, only worse (`left_out`), which is chance there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from benchmarks.attacks.blinding import BLINDINGS, FOREVER
from benchmarks.attacks.traces import Trace
from benchmarks.attacks.victims import Plain

Surrogate = Callable[[Any], Any]
Link = tuple[str, str]


def twice_chance(chance: float, guesses: float) -> float:
    """Threshold of a share: twice chance, or where that may be luck, three standard errors above.

    Args:
      chance: share that guessing reaches.
      guesses: over which the share is taken; from nine lucky ones on it is twice chance.
    """
    return chance + max(chance, 3 * (chance / guesses) ** 0.5)


def lifetime(trace: Trace) -> int:
    """Steps for which feature keys are kept; the scheme is public, so the attacker knows it."""
    return BLINDINGS[trace.scheme].lifetime


def windows(trace: Trace, longest: int = FOREVER) -> list[range]:
    """Steps that share feature keys, at most `longest` at a time."""
    total, size = len(trace.views), min(lifetime(trace), longest)
    return [range(i, min(i + size, total)) for i in range(0, total, size)]


def frames(trace: Trace, step: int, link: Link) -> tuple[np.ndarray, np.ndarray]:
    """Key matrices of the first product's columns and of the second's inner axis."""
    first, second = (trace.truth[step][name] for name in link)
    if first.c is None or second.b is None:
        raise ValueError(
            f"{trace.victim}, {link}: the keys are not known, so nothing can be scored"
        )
    return first.c, second.b


def columns_linked(
    trace: Trace, step: int, link: Link, pairs: tuple[np.ndarray, np.ndarray]
) -> float:
    """Share of pairs whose columns carry the same neuron.

    A column carries the neuron that weighs most in it. The inner axis of a convolution holds nine
    shifts of every channel, and any of them counts.

    Args:
      trace: with keys.
      step: whose keys.
      link: the two products.
      pairs: columns of the first's y and of the second's x.
    """
    c, b = frames(trace, step, link)
    sources = np.abs(c).argmax(1)[pairs[0]], np.abs(b).argmax(1)[pairs[1]] % len(c)
    return float(np.mean(sources[0] == sources[1]))


def columns_that_belong(trace: Trace, step: int, link: Link) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of columns that hold most of the same neurons, by the keys.

    What `columns_linked` gives for these is all that pairing columns can reach.
    """
    c, b = frames(trace, step, link)
    c = c / np.linalg.norm(c, axis=1, keepdims=True)
    b = (b / np.linalg.norm(b, axis=1, keepdims=True)).reshape(len(b), -1, c.shape[1])
    return paired(np.linalg.norm(np.einsum("ik,jsk->ijs", c, b, optimize=True), axis=2))


def paired(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs rows with columns: one to one, or where columns are shifts each with its best row."""
    if similarity.shape[0] == similarity.shape[1]:
        return linear_sum_assignment(-similarity)
    return similarity.argmax(0), np.arange(similarity.shape[1])


def directions_linked(
    trace: Trace, step: int, link: Link, u: np.ndarray, v: np.ndarray, least: float = 0.5
) -> int:
    """How many pairs of directions belong together.

    ``ŷ u_k`` and ``x̂ v_k`` read the plain neurons with weights ``Cᵀ u_k`` and ``Bᵀ v_k``; a pair
    counts if their cosine is at least `least`. Under a convolution the second has nine shifts,
    whose cosines are joined.

    Args:
      trace: with keys.
      step: whose keys.
      link: the two products.
      u: (p, k) directions in the first's columns.
      v: (n, k) directions in the second's inner axis.
      least: cosine from which a pair is linked.
    """
    c, b = frames(trace, step, link)
    first = c.T @ u
    second = (b.T @ v).reshape(-1, *first.shape)
    norms = np.linalg.norm(first, axis=0) * np.sqrt((second**2).sum((0, 1))) + 1e-300
    cosines = np.linalg.norm((first * second).sum(1), axis=0) / norms
    return int((cosines >= least).sum())


def weight(trace: Trace, step: int, link: Link) -> np.ndarray:
    """The second product's weight for rows of x̂; the key of its columns is given away."""
    second = trace.truth[step][link[1]]
    return np.linalg.solve(frames(trace, step, link)[1].T, second.w) / second.scales[0]


class Replaced(Plain):
    """Plain products, but the second of a link is what an attacker predicts of it."""

    def __init__(
        self, trace: Trace, step: int, link: Link, predict: Surrogate, *, blur: bool = False
    ):
        """Takes the first's frame from the keys.

        Args:
          trace: with keys.
          step: whose frame it is.
          link: two products of weights.
          predict: maps rows in the blinded frame of the first's y to plain rows of the second.
          blur: whether pixels are replaced by the mean of the nine about them.
        """
        self.link, self.predict, self.blur = link, predict, blur
        first = trace.truth[step][link[0]]
        c, _ = frames(trace, step, link)
        self.into = c.T * (first.scales[0] * first.scales[1])
        self.y = jnp.zeros(0)

    def dense(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Products`."""
        if name == self.link[1]:
            return self.predict(self.y @ self.into)
        y = x @ w
        if name == self.link[0]:
            self.y = y
        return y

    def convolve(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """See `Products`."""
        if name == self.link[1]:
            rows = self.y.reshape(-1, self.y.shape[-1])
            return jnp.asarray(self.predict(rows @ self.into)).reshape(*x.shape[:3], -1)
        y = super().convolve(name, x, w)
        if name == self.link[0]:
            self.y = _mean_of_nine(y) if self.blur else y
        return y


def _mean_of_nine(y: jax.Array) -> jax.Array:
    size, stride = (1, 3, 3, 1), (1, 1, 1, 1)
    return jax.lax.reduce_window(y, np.zeros((), y.dtype), jax.lax.add, size, stride, "SAME") / 9


def stolen(trace: Trace, step: int, link: Link, surrogate: Surrogate) -> float:
    """Test accuracy of the model that the attacker builds, see the module's docstring.

    Of a convolution the better of what the middle pixel and the mean of nine give.

    Args:
      trace: with keys.
      step: whose blinded weights it takes.
      link: two products of weights.
      surrogate: maps rows in the blinded frame of the first's y to rows in that of the second's x.
    """
    second = weight(trace, step, link)

    def accuracy(*, blur: bool) -> float:
        products = Replaced(trace, step, link, lambda rows: surrogate(rows) @ second, blur=blur)
        return trace.model.accuracy(trace.parameters, products)

    return max(accuracy(blur=b) for b in ((False, True) if convolves(trace, link) else (False,)))


def convolves(trace: Trace, link: Link) -> bool:
    """Whether the second product of a link is a convolution."""
    weight = trace.parameters.get(link[1])
    return weight is not None and weight.ndim == 4


def left_out(trace: Trace, step: int, link: Link) -> float:
    """Test accuracy without the second product: what needs no link at all."""
    width = trace.truth[step][link[1]].w.shape[1]
    products = Replaced(trace, step, link, lambda rows: jnp.zeros((len(rows), width)))
    return trace.model.accuracy(trace.parameters, products)


def margin(trace: Trace, chance: float, points: float, share: float) -> float:
    """Accuracy over chance that passes: `points`, or a share of all there is to gain, if less."""
    return min(points, share * max(0.0, trace.model.accuracy(trace.parameters) - chance))


def stealable(trace: Trace) -> list[Link]:
    """Links between two weights; a head of attention multiplies activations, which end with it."""
    return [link for link in trace.links() if "." not in link[0]]
