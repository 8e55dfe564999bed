"""The Tempo paper's evaluation: how good a substitute does the host build?

A *black-box* substitute is trained from scratch on the few labelled examples that the host owns; a
*white-box* one is the victim itself. Between them lies one that starts from what was seen. Two ways
to start are tried. *As seen*: blinded weights where plain ones belong. *Linked*: columns of the
first layer named by the host's own images, columns of the next by S1's methods, signs and biases by
sorted values, as far as the victim is an MLP.

A transformer's embeddings are in no product, so nobody sees them, and without them the plain
weights of all products gain next to nothing. The host is granted them, as from a public model of
which the victim is a descendant; so is the black-box substitute.

References:
  Tempo: Confidentiality Preservation in Cloud-Based Neural Network Training,
  https://arxiv.org/abs/2401.11531
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from benchmarks.attacks import linkage, scoring
from benchmarks.attacks.blinding import BLINDINGS
from benchmarks.attacks.inputs import match_columns
from benchmarks.attacks.results import Measurement, measure
from benchmarks.attacks.traces import Trace
from benchmarks.attacks.victims import VICTIMS, Parameters, Plain

LABELS = 100
# Images of which a hundred teach a substitute all that the victim knows; windows of text, each of
# them with 128 labels.
FEW_LABELS = {"cnn": 20, "transformer": 16}
GRANTED = {"transformer": ("tokens", "positions")}
RESTARTS = 4
DRAWS = 3  # sets of labelled examples, over which accuracies are averaged
STEPS = 200
LEARNING_RATE = 1e-3
MAX_STEPS = 4  # whose rows are joined
POINTS, SHARE = 0.05, 0.5  # of accuracy over chance that pass, see `scoring.margin`


@functools.cache
def _trainer(victim: str) -> Callable:
    """A compiled step of Adam, which takes (parameters, state), inputs and labels."""
    model, optimizer = VICTIMS[victim], optax.adam(LEARNING_RATE)

    @jax.jit
    def step(carry, inputs, labels):
        parameters, state = carry
        gradients = jax.grad(model.loss)(parameters, inputs, labels, Plain())
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return step


def train_substitute(
    victim: str, parameters: Parameters, inputs: np.ndarray, labels: np.ndarray
) -> float:
    """Trains on all examples at once from `parameters`, and returns test accuracy."""
    parameters = {name: jnp.asarray(value) for name, value in parameters.items()}
    carry = parameters, optax.adam(LEARNING_RATE).init(parameters)
    for _ in range(STEPS):
        carry = _trainer(victim)(carry, inputs, labels)
    return VICTIMS[victim].accuracy(carry[0])


def as_seen(trace: Trace, fresh: Parameters) -> Parameters:
    """Blinded weights in place of drawn ones, of the norm of those."""
    start = dict(fresh)
    for name, view in trace.views[0].items():
        if view.w is not None and name in start:
            w = view.w.reshape(start[name].shape)
            start[name] = w * np.linalg.norm(start[name]) / np.linalg.norm(w)
    return start


def row_signs(x: np.ndarray) -> np.ndarray:
    """Signs of rows of products of inputs that are not negative."""
    mean = np.linalg.eigh(x.T @ x)[1][:, -1]
    return np.where(x @ mean < 0, -1.0, 1.0)[:, None]


def pair_columns(y: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Factor a and bias b for which sorted ``max(0, a y + b)`` is nearest sorted `x`.

    ReLU keeps the order of what it lets through, so the largest values correspond, whatever became
    of the rows.
    """
    target = np.sort(x)[::-1]
    count = int(np.clip((target > 1e-9).sum(), 2, min(len(y), len(x))))
    best = 1.0, 0.0, np.inf
    for sign in (1.0, -1.0):
        ordered = np.sort(sign * y)[::-1]
        design = np.stack([ordered[:count], np.ones(count)], 1)
        factor, bias = np.linalg.lstsq(design, target[:count])[0]
        error = float(((np.maximum(factor * ordered + bias, 0) - target) ** 2).sum())
        if error < best[2]:
            best = sign * float(factor), float(bias), error
    return best[0], best[1]


def name_columns(trace: Trace, rng: np.random.Generator) -> Parameters | None:
    """Layers of an MLP with names, signs, factors and biases as if keys were permutations.

    Returns:
      Weights and biases of all layers that were outside, the last one's columns in the host's
      order; or None, if the victim has layers of another kind.
    """
    if trace.victim not in ("mlp", "mlp_bn", "mlp_large"):
        return None
    layers = [name for name in trace.names if trace.outside(name)]
    if layers[:2] != ["dense1", "dense2"]:
        return None
    scaled = BLINDINGS[trace.scheme].rows == "scaled"
    window = scoring.windows(trace, MAX_STEPS)[0]
    normalized = trace.victim == "mlp_bn"

    def rows(name: str, what: str) -> np.ndarray:
        """Rows of all steps, their signs undone together, so that steps agree."""
        views = [trace.views[t][name] for t in window]
        signs = np.split(row_signs(np.concatenate([v.x for v in views])), len(views))  # pyright: ignore
        values = [s * getattr(v, what) for s, v in zip(signs, views, strict=True)]
        if normalized and what == "y":
            values = [(v - v.mean(0)) / (v.std(0) + 1e-12) for v in values]
        return np.concatenate(values)

    x = rows("dense1", "x")
    order = match_columns(x, trace.model.data().test_inputs, rng, scaled=scaled)
    found: Parameters = {}
    for i, name in enumerate(layers):
        w = trace.views[window[0]][name].w
        assert w is not None
        signs = np.where(x.sum(0) < 0, -1.0, 1.0)
        found[name] = np.zeros_like(w)
        found[name][order] = signs[:, None] * w
        if i + 1 == len(layers):
            break
        pairs = [(trace.views[t][name], trace.views[t][layers[i + 1]]) for t in window]
        similarity = linkage.similarities(pairs, rng, scaled=scaled)["all"]
        sources, targets = linear_sum_assignment(-similarity)
        order = np.empty_like(sources)
        order[targets] = sources
        y, x = rows(name, "y"), rows(layers[i + 1], "x")
        fits = [pair_columns(y[:, j], abs(x[:, k])) for j, k in zip(sources, targets, strict=True)]
        factors, biases = np.array(fits).T
        found[f"{name}.bias"] = biases
        found[f"{name}.gain"] = factors
        if not normalized:
            found[name] *= factors
    return found


def name_classes(trace: Trace, start: Parameters, inputs: np.ndarray, labels: np.ndarray) -> None:
    """Gives the last layer's columns the classes and signs that fit the labels best, in place."""
    logits = np.asarray(trace.model.apply(start, jnp.asarray(inputs), Plain()))
    classes = labels[:, None] == np.arange(logits.shape[1])
    scores = (logits - logits.mean(0)).T @ (classes - classes.mean(0))
    columns, names = linear_sum_assignment(-np.abs(scores))
    head = start["head"].copy()
    head[:, names] = start["head"][:, columns] * np.sign(scores[columns, names])
    start["head"] = head


def attack(trace: Trace, rng: np.random.Generator) -> list[Measurement]:
    """Builds substitutes and compares them with the baselines.

    The best of all ways to build one is reported, as if the host could tell.

    Args:
      trace: whose first step the weights are taken from.
      rng: draws labelled examples and fresh weights.
    """
    victim, data = trace.model, trace.model.data()
    accuracies: dict[str, list[float]] = {}
    count = FEW_LABELS.get(trace.victim, LABELS)
    # Pixels are matched from random starts, and a mirrored match is hard to leave.
    names = [name_columns(trace, rng) for _ in range(RESTARTS)]
    for _ in range(DRAWS):
        chosen = rng.choice(len(data.inputs), count, replace=False)
        owned = data.inputs[chosen], data.labels[chosen]
        granted = {name: trace.parameters[name] for name in GRANTED.get(trace.victim, ())}
        fresh = victim.initialize(rng) | granted
        starts = {"black-box": fresh, "as seen": as_seen(trace, fresh)}
        untrained = victim.accuracy(starts["as seen"])
        accuracies.setdefault("as seen, not trained", []).append(untrained)
        for i, named in enumerate(names):
            if named is None:
                continue
            starts[f"linked {i}"] = linked = fresh | named
            if "head" in named:
                name_classes(trace, linked, *owned)
                untrained = victim.accuracy(linked)
                accuracies.setdefault(f"linked {i}, not trained", []).append(untrained)
        for name, start in starts.items():
            accuracy = train_substitute(trace.victim, start, *owned)
            accuracies.setdefault(name, []).append(accuracy)
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}
    baseline, white_box = means.pop("black-box"), victim.accuracy(trace.parameters)
    best = max(means, key=lambda name: means[name])
    return [
        measure(
            "theft",
            "substitute's accuracy",
            means[best],
            chance=baseline,
            threshold=baseline + scoring.margin(trace, baseline, POINTS, SHARE),
            best=white_box,
            note=f"{best}, {count} examples; chance: black-box; white-box {white_box:.3f}",
        )
    ]
