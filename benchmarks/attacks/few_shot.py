"""S9: one step and a hundred public labels.

The link between two layers is estimated from the one step, as in S3; where feature keys are kept,
from the steps before it as well. What it leaves unknown, gains along the principal directions of ŷ
and an offset, is trained on public labels through the blinded weights. The control trains the same
gains on random frames: what labels alone give. Both keep the frame that fits the public labels
best, so chance is the expectation of the best of as many random frames as the attack estimates,
taken over more of them; the attack's own figure still scatters by 0.03, and `best` picks among
three. Of text 16 windows are public: a hundred characters only spoil a link that was right.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.attacks import congruence, scoring
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import Trace

LABELS = 100
WINDOWS = 16  # of text, whose next characters are labels that cost nothing
STEPS = 6
POOLED = 4  # steps from which the link is estimated, where feature keys are kept
RESTARTS = 6
RANDOM = 2  # random frames for each estimated one
FIT_STEPS = 150
# Gains to train: few leave the work to the link, many let labels repair it.
GAINS = (1, 16, 128)
POINTS, SHARE = 0.10, 0.5  # of accuracy over chance that pass, see `scoring.margin`


def fit(
    trace: Trace, step: int, link: scoring.Link, maps: list[np.ndarray], chosen: np.ndarray
) -> np.ndarray:
    """Trains gains and an offset on public examples, for every map and sign.

    Args:
      trace: with keys.
      step: whose blinded weights it takes.
      link: two products of weights.
      maps: candidates for ``x̂ ≈ ± ŷ M``.
      chosen: which training examples are public.

    Returns:
      (maps, gains, 2): loss on the public labels, in nats, and stolen accuracy, the better sign's.
    """
    model, data = trace.model, trace.model.data()
    y = trace.views[step][link[0]].y
    assert y is not None
    axes = np.linalg.eigh(y.T @ y)[1][:, ::-1]
    size = len(axes)
    # Neighbouring directions share a gain.
    bands = [np.arange(size) * min(gains, size) // size for gains in GAINS]
    shares = [np.eye(size)[:, band] for band in bands]
    # Trained after the weight, which takes one product less; an offset there does the same.
    weight = scoring.weight(trace, step, link)
    scaled = [congruence.rescale(trace, step, link, m) @ weight for m in maps]
    both = np.stack([sign * (axes.T @ m) for m in scaled for sign in (1, -1)])
    optimizer = optax.adam(0.05)
    # Of nine pixels the mean is told best by a linear link.
    blur = scoring.convolves(trace, link)

    def apply(weights, m, share, inputs):
        def predict(rows):
            return ((rows @ axes) * (weights[0] @ share)) @ m + weights[1]

        products = scoring.Replaced(trace, step, link, predict, blur=blur)
        parameters = {name: jnp.asarray(value) for name, value in trace.parameters.items()}
        return model.apply(parameters, inputs, products)

    def loss(weights, m, share, inputs):
        logits = apply(weights, m, share, inputs)
        labels = jnp.asarray(data.labels[chosen].reshape(-1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train(m, share, public_inputs, test_inputs):
        def update(carry, _):
            weights, state = carry
            gradients = jax.grad(loss)(weights, m, share, public_inputs)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(weights, updates), state), None

        weights = (jnp.ones(size), jnp.zeros(m.shape[1]))
        (weights, _), _ = jax.lax.scan(update, (weights, optimizer.init(weights)), None, FIT_STEPS)
        guessed = apply(weights, m, share, test_inputs).argmax(-1)
        accuracy = (guessed == jnp.asarray(data.test_labels.reshape(-1))).mean()
        return jnp.stack([loss(weights, m, share, public_inputs), accuracy])

    # Inputs are arguments, since XLA would spend seconds on folding constants of their size.
    every = jax.jit(
        jax.vmap(jax.vmap(train, in_axes=(None, 0, None, None)), in_axes=(0, None, None, None))
    )
    inputs = data.inputs[chosen], data.test_inputs
    # Twice as fast in float32, and labels fix no gain to more digits.
    with jax.enable_x64(False):
        found = np.asarray(every(both, np.stack(shares), *inputs))
    found = found.reshape(len(maps), 2, len(GAINS), 2)
    better = found[..., 0].argmin(1)
    return np.take_along_axis(found, better[:, None, :, None], axis=1)[:, 0]


def best_fit(fitted: np.ndarray, tries: int) -> float:
    """Expected accuracy of the lowest loss among `tries` of these, drawn without replacement.

    Args:
      fitted: (n, 2), loss and accuracy, ``n >= tries``.
      tries: how many an attacker has.
    """
    accuracies = fitted[fitted[:, 0].argsort(), 1]
    # The one of rank i is the best if the others come from the n - 1 - i behind it.
    ways = [math.comb(len(fitted) - 1 - i, tries - 1) for i in range(len(fitted))]
    return float(accuracies @ ways / sum(ways))


def attack(
    trace: Trace, rng: np.random.Generator, restarts: int = RESTARTS, steps: int = STEPS
) -> list[Measurement]:
    """Steals with as many gains as help most over what they reach on random frames."""
    if not (links := scoring.stealable(trace)):
        return []
    link, total = links[0], len(trace.views)
    labels = trace.model.data().labels
    examples = LABELS if labels.ndim == 1 else WINDOWS
    stolen: dict[int, list[float]] = {gains: [] for gains in GAINS}
    control: dict[int, list[float]] = {gains: [] for gains in GAINS}
    for step in range(max(0, total - steps), total):
        chosen = rng.choice(len(labels), examples, replace=False)
        span = range(max(0, step + 1 - min(POOLED, scoring.lifetime(trace))), step + 1)
        maps = [m for m, _ in congruence.link_layers(trace, link, span, rng, restarts)]
        guesses = congruence.random_maps(trace, link, span, rng, RANDOM * len(maps))
        fitted = fit(trace, step, link, maps + guesses, chosen)
        for kept, part in ((stolen, fitted[: len(maps)]), (control, fitted[len(maps) :])):
            for i, gains in enumerate(GAINS):
                kept[gains].append(best_fit(part[:, i], len(maps)))
    best = max(GAINS, key=lambda n: np.mean(stolen[n]) - np.mean(control[n]))
    # In a residual model a random frame may be worse than none.
    chance = max(float(np.mean(control[best])), scoring.left_out(trace, total - 1, link))
    every = ", ".join(f"{np.mean(stolen[n]):.2f}/{np.mean(control[n]):.2f}" for n in GAINS)
    return [
        measure(
            "S9",
            "stolen",
            float(np.mean(stolen[best])),
            chance=chance,
            threshold=chance + scoring.margin(trace, chance, POINTS, SHARE),
            note=f"{best} gains on {len(stolen[best])} steps; all, with random frames: {every}",
        )
    ]
