"""Traces: what a host saw of a training run, beside the truth that an attack is scored with.

`simulate` trains in the clear and blinds what it recorded, with keys it knows; `recording.record`
runs the library itself. An attack may use `Trace.views` and what is public (the architecture, other
data of the same kind); `Trace.truth` and what follows it are for scoring.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.attacks import blinding
from benchmarks.attacks.blinding import Blinding, Key
from benchmarks.attacks.victims import VICTIMS, Parameters, Plain, Victim, unfolded

CACHE = pathlib.Path.home() / ".cache" / "tempo_jax" / "attacks"
VERSION = 1  # raise it when a change here changes what is recorded
MIN_WIDTH, MIN_ROWS = 64, 128  # what `Mixing` keeps inside, see SECURITY.md section 3


@dataclasses.dataclass
class ProductView:
    """A product as the host sees it, float64 and 2-D; None where it is not outside.

    Attributes:
      x: blinded ``(rows, n)``.
      w: blinded ``(n, p)``.
      y: ``x @ w``.
      g: blinded gradient of `y`, as it is for dW where a scheme blinds it for each product.
      dx: ``g @ w.T``, with `g` as it is for dX.
      dw: ``x.T @ g``, in a kept-key scheme with two polarities ``x_dual.T @ g_dual``.
      x_dual: `x` in the polarity that brings `dw` into the layout of `w`, where one is needed.
      g_dual: likewise of `g`.
      g_of_dx: `g` as it is for dX where a scheme blinds it for each product; under W's key where
        `g` is under that of the rows of X.
    """

    x: np.ndarray | None
    w: np.ndarray | None
    y: np.ndarray | None
    g: np.ndarray | None
    dx: np.ndarray | None
    dw: np.ndarray | None
    x_dual: np.ndarray | None = None
    g_dual: np.ndarray | None = None
    g_of_dx: np.ndarray | None = None

    @property
    def g_under_w(self) -> np.ndarray | None:
        """The blinded gradient of `y` whose columns are under W's key."""
        return self.g if self.g_of_dx is None else self.g_of_dx


Powers = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass
class ProductTruth:
    """The plain product, and its keys where they are known.

    Attributes:
      x: plain ``(m, n)``, without decoys, as are the others.
      w: plain ``(n, p)``.
      g: gradient of ``x @ w``.
      keys: of rows, of n and of p.
      scales: random scalars of x, w and g.
      decoys_x: rows below `x`, or None.
      decoys_g: rows below `g`, or None.
      mask: added to `w`, or None.
      mask_x: added to `x`, or None.
      mask_g: added to `g`, or None.
      powers: of two, for each index of rows, n and p, by which the enclave evened out what it
        blinded, or None. They are a part of `keys`: ``A = A' diag(powers[0])``.
    """

    x: np.ndarray
    w: np.ndarray
    g: np.ndarray
    keys: tuple[Key, Key, Key] | None = None
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    decoys_x: np.ndarray | None = None
    decoys_g: np.ndarray | None = None
    mask: np.ndarray | None = None
    mask_x: np.ndarray | None = None
    mask_g: np.ndarray | None = None
    powers: Powers | None = None

    @functools.cached_property
    def y(self) -> np.ndarray:
        """``x @ w``."""
        return self.x @ self.w

    @functools.cached_property
    def dx(self) -> np.ndarray:
        """Gradient of `x`."""
        return self.g @ self.w.T

    @functools.cached_property
    def dw(self) -> np.ndarray:
        """Gradient of `w`."""
        return self.x.T @ self.g

    @property
    def a(self) -> np.ndarray | None:
        """Key matrix of the rows, as in ``x̂ = A [x; decoys_x] Bᵀ``."""
        return None if self.keys is None else self.keys[0].matrix

    @property
    def b(self) -> np.ndarray | None:
        """Key matrix of n."""
        return None if self.keys is None else self.keys[1].matrix

    @property
    def c(self) -> np.ndarray | None:
        """Key matrix of p, as in ``ŵ = B⁻ᵀ w Cᵀ``."""
        return None if self.keys is None else self.keys[2].matrix


@dataclasses.dataclass
class Trace:
    """Some steps of training as the host saw them, and the truth.

    Attributes:
      scheme: name of the scheme or control.
      victim: key of `VICTIMS`.
      seed: of weights, batches and (simulated) keys.
      names: products in forward order.
      views: for each step, the products that were outside.
      truth: for each step, every product, those inside as well.
      parameters: the victim's plain parameters at the last recorded step, before its update.
      inputs: plain inputs of each step's batch.
      labels: labels of each step's batch.
      recorded: whether the library itself made the views.
    """

    scheme: str
    victim: str
    seed: int
    names: tuple[str, ...]
    views: list[dict[str, ProductView]]
    truth: list[dict[str, ProductTruth]]
    parameters: Parameters
    inputs: list[np.ndarray]
    labels: list[np.ndarray]
    recorded: bool = False

    @property
    def model(self) -> Victim:
        """The victim itself; its architecture is public, its parameters are not."""
        return VICTIMS[self.victim]

    def outside(self, name: str) -> bool:
        """Whether the host saw a product."""
        return name in self.views[0]

    def scored(self, name: str) -> bool:
        """Whether the host saw a product whose keys the evaluator knows."""
        return self.outside(name) and self.truth[0][name].keys is not None

    def links(self) -> list[tuple[str, str]]:
        """Adjacent products that were both outside, one pair for each attention head."""
        pairs = []
        for first, second in self.model.links:
            firsts = [n for n in self.names if n.split(".")[0] == first and self.scored(n)]
            seconds = [n for n in self.names if n.split(".")[0] == second and self.scored(n)]
            pairs += zip(firsts, seconds, strict=False)
        return pairs


@dataclasses.dataclass
class History:
    """Training in the clear: operands (x, w, g) of every product at every step.

    Attributes:
      names: products in forward order.
      steps: for each step, the operands by product.
      parameters: at the last step, before its update.
      inputs: of each step.
      labels: of each step.
    """

    names: tuple[str, ...]
    steps: list[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]
    parameters: Parameters
    inputs: list[np.ndarray]
    labels: list[np.ndarray]


class _Tape:
    """Products that keep their operands, and add a zero to whose gradient is that of y."""

    def __init__(self, probes: dict[str, jax.Array] | None):
        self.probes = probes
        self.kept: dict[str, tuple[jax.Array, jax.Array]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _run(self, multiply: Callable, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        y = multiply(name, x, w)
        self.kept[name], self.shapes[name] = (x, w), y.shape
        return y if self.probes is None else y + self.probes[name]

    def dense(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        return self._run(Plain().dense, name, x, w)

    def convolve(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        return self._run(Plain().convolve, name, x, w)

    def attend(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        return self._run(Plain().attend, name, x, w)


def unfold(
    name: str, x: np.ndarray, w: np.ndarray, g: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Turns a product of any kind into 2-D products: `name`, or ``name.batch.head`` for each."""
    x, w, g = (np.asarray(v, np.float64) for v in (x, w, g))
    if x.ndim == 2:
        return {name: (x, w, g)}
    if w.shape[:2] == x.shape[:2]:
        indices = np.ndindex(*x.shape[:2])
        return {f"{name}.{i}.{j}": (x[i, j], w[i, j], g[i, j]) for i, j in indices}
    return {name: (unfolded(x, (3, 3)), w.reshape(-1, w.shape[-1]), g.reshape(-1, g.shape[-1]))}


def batches(victim: Victim, seed: int, count: int, batch: int, *, repeat: bool) -> list[np.ndarray]:
    """Draws which examples each step trains on; with `repeat`, one batch for all recorded steps."""
    rng = np.random.default_rng([seed, 1])
    size = len(victim.data().inputs)
    drawn = [rng.choice(size, batch, replace=False) for _ in range(victim.warm_up + count)]
    if repeat:
        drawn[victim.warm_up :] = [drawn[victim.warm_up]] * count
    return drawn


def warm_up(victim: Victim, seed: int, drawn: list[np.ndarray]) -> tuple[Parameters, object]:
    """Trains `victim.warm_up` steps in the clear.

    Returns:
      Parameters and the optimizer's state.
    """
    data, optimizer = victim.data(), victim.optimizer
    parameters = jax.tree.map(jnp.asarray, victim.initialize(np.random.default_rng([seed, 0])))
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, inputs, labels):
        gradients = jax.grad(victim.loss)(parameters, inputs, labels, Plain())
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    for chosen in drawn[: victim.warm_up]:
        parameters, state = step(parameters, state, data.inputs[chosen], data.labels[chosen])
    return parameters, state


def start(
    victim: Victim, seed: int, drawn: list[np.ndarray], *, linear: bool
) -> tuple[optax.GradientTransformation, tuple[Parameters, Any]]:
    """The optimizer of the recorded steps, and parameters and moments after the warm-up."""
    parameters, moments = warm_up(victim, seed, drawn)
    if not linear:
        return victim.optimizer, (parameters, moments)
    optimizer = victim.linear_optimizer
    return optimizer, (parameters, optimizer.init(parameters))


def train(
    victim: Victim,
    seed: int,
    steps: int,
    *,
    batch: int | None = None,
    repeat: bool = False,
    linear: bool = False,
) -> History:
    """Trains in the clear and keeps every operand of the last `steps` steps.

    Args:
      victim: what to train.
      seed: of weights and batches.
      steps: recorded.
      batch: examples in a step; the victim's own by default.
      repeat: whether every recorded step sees the same batch.
      linear: whether recorded steps are `Victim.linear_optimizer`'s.
    """
    data = victim.data()
    drawn = batches(victim, seed, steps, batch or victim.batch, repeat=repeat)
    optimizer, (parameters, state) = start(victim, seed, drawn, linear=linear)

    def loss(parameters, probes, inputs, labels):
        tape = _Tape(probes)
        return victim.loss(parameters, inputs, labels, tape), tape.kept

    differentiate: Callable = jax.grad(loss, argnums=(0, 1), has_aux=True)

    def advance(parameters, state, probes, inputs, labels):
        (gradients, outputs), kept = differentiate(parameters, probes, inputs, labels)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, kept, outputs

    step: Callable = jax.jit(advance)
    tape = _Tape(None)
    first = drawn[victim.warm_up]
    jax.eval_shape(
        lambda p: victim.loss(p, data.inputs[first], data.labels[first], tape), parameters
    )
    probes = {name: jnp.zeros(shape) for name, shape in tape.shapes.items()}
    history = History((), [], {}, [], [])
    for chosen in drawn[victim.warm_up :]:
        inputs, labels = data.inputs[chosen], data.labels[chosen]
        history.parameters = {name: np.asarray(value) for name, value in parameters.items()}
        parameters, state, kept, outputs = step(parameters, state, probes, inputs, labels)
        products = {}
        for name in probes:
            products |= unfold(name, *kept[name], outputs[name])  # pyright: ignore[reportCallIssue]
        history.steps.append(products)
        history.inputs.append(inputs)
        history.labels.append(labels)
    history.names = tuple(history.steps[0])
    return history


def _save(history: History, path: pathlib.Path) -> None:
    arrays = {"names": np.array(history.names)}
    arrays |= {f"p/{name}": value for name, value in history.parameters.items()}
    for i, products in enumerate(history.steps):
        arrays |= {f"inputs/{i}": history.inputs[i], f"labels/{i}": history.labels[i]}
        for name, operands in products.items():
            arrays |= {f"{i}/{name}/{k}": v for k, v in zip("xwg", operands, strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a run cut short leaves no half of a file.
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)  # pyright: ignore[reportArgumentType]
    partial.replace(path)


def _load(path: pathlib.Path, steps: int) -> History:
    with np.load(path) as arrays:
        names = tuple(str(name) for name in arrays["names"])
        return History(
            names,
            [
                {n: tuple(arrays[f"{i}/{n}/{k}"] for k in "xwg") for n in names}  # pyright: ignore
                for i in range(steps)
            ],
            {key[2:]: arrays[key] for key in arrays.files if key.startswith("p/")},
            [arrays[f"inputs/{i}"] for i in range(steps)],
            [arrays[f"labels/{i}"] for i in range(steps)],
        )


def cached_train(
    victim: Victim,
    seed: int,
    steps: int,
    *,
    batch: int | None = None,
    repeat: bool = False,
    linear: bool = False,
    cache: pathlib.Path | None = CACHE,
) -> History:
    """`train`, kept on disk under a name made of all that determines it; None: no cache."""
    if cache is None:
        return train(victim, seed, steps, batch=batch, repeat=repeat, linear=linear)
    source = pathlib.Path(__file__).with_name("victims.py").read_bytes()
    run = (victim.name, seed, steps, batch or victim.batch, repeat, linear)
    settings = (VERSION, jax.__version__, *run)
    name = hashlib.sha256(repr(settings).encode() + source).hexdigest()[:16]
    path = cache / f"{victim.name}-{seed}-{name}.npz"
    if path.exists():
        return _load(path, steps)
    history = train(victim, seed, steps, batch=batch, repeat=repeat, linear=linear)
    _save(history, path)
    return history


def blind_product(
    how: Blinding,
    operands: tuple[np.ndarray, np.ndarray, np.ndarray],
    row_rng: np.random.Generator,
    feature_rng: np.random.Generator,
    rng: np.random.Generator,
) -> tuple[ProductView, ProductTruth]:
    """Blinds one product of one step.

    Args:
      how: the scheme.
      operands: plain x, w and g.
      row_rng: draws the row key.
      feature_rng: draws the two feature keys; in the same state as long as they are kept.
      rng: draws decoys and scalars.
    """
    x, w, g = operands
    truth = ProductTruth(x, w, g)
    if how.shares:
        # Modulo the ring, so that what a product of shares lacks is no mask.
        x, w, g = (blinding.draw_share(rng, v) for v in operands)
    if how.energy:
        truth.mask_x, truth.mask, truth.mask_g = (
            blinding.draw_full_mask(rng, v, how.energy) for v in operands
        )
        x, w, g = x + truth.mask_x, w + truth.mask, g + truth.mask_g
    if how.decoys != "none":
        truth.decoys_x, truth.decoys_g = (blinding.decoys_below(how, v, rng) for v in (x, g))
        x, g = np.concatenate([x, truth.decoys_x]), np.concatenate([g, truth.decoys_g])
    if how.scalars:
        truth.scales = tuple(np.exp(rng.uniform(-1, 1, 3)))
    if how.masked:
        truth.mask = blinding.draw_mask(rng, w)
        w = w + truth.mask
    a = blinding.GROUPS[how.rows](row_rng, len(x))
    b, c = (blinding.GROUPS[how.features](feature_rng, size) for size in w.shape)
    truth.keys = (a, b, c)
    tx, tw, tg = truth.scales
    blinded_x = tx * b.apply(a.apply(x).T).T
    blinded_w = tw * c.apply(b.apply(w, polar=True).T).T
    blinded_g = tg * c.apply(a.apply(g, polar=True).T, polar=True).T
    view = ProductView(
        blinded_x,
        blinded_w,
        blinded_x @ blinded_w,
        blinded_g,
        blinded_g @ blinded_w.T,
        blinded_x.T @ blinded_g,
    )
    if how.dual:
        view.x_dual = b.apply(a.apply(x).T, polar=True).T
        view.g_dual = c.apply(a.apply(g, polar=True).T).T
        view.dw = view.x_dual.T @ view.g_dual
    return view, truth


def stays_inside(victim: Victim, name: str, x: np.ndarray, w: np.ndarray) -> bool:
    """Whether the policy of `Mixing` keeps a product in the enclave."""
    return name.split(".")[0] in victim.inside or min(w.shape) < MIN_WIDTH or len(x) < MIN_ROWS


def blind_history(history: History, victim: Victim, scheme: str, seed: int) -> Trace:
    """Blinds a plain history with fresh or kept simulated keys."""
    how = blinding.BLINDINGS[scheme]
    tag = zlib.crc32(scheme.encode())
    views, truths = [], []
    for step, products in enumerate(history.steps):
        views.append({})
        truths.append({})
        for number, (name, operands) in enumerate(products.items()):
            x, w, _ = operands
            if how.keeps_inside and stays_inside(victim, name, x, w):
                truths[-1][name] = ProductTruth(*operands)
                continue
            epoch = step // how.lifetime
            row = (seed, tag, 1, step, 0 if how.shared_rows else number)
            generators = (row, (seed, tag, 2, epoch, number), (seed, tag, 3, step, number))
            view, truth = blind_product(how, operands, *map(np.random.default_rng, generators))
            views[-1][name], truths[-1][name] = view, truth
    return Trace(
        scheme,
        victim.name,
        seed,
        history.names,
        views,
        truths,
        history.parameters,
        history.inputs,
        history.labels,
    )


def simulate(
    victim: str,
    scheme: str,
    seed: int,
    steps: int,
    *,
    batch: int | None = None,
    repeat: bool = False,
    cache: pathlib.Path | None = CACHE,
) -> Trace:
    """Trains a victim in the clear and blinds what it recorded.

    Args:
      victim: key of `VICTIMS`.
      scheme: key of `blinding.BLINDINGS`.
      seed: of weights, batches and keys.
      steps: recorded steps, after the victim's warm-up; the weights move.
      batch: examples in a step; the victim's own by default.
      repeat: whether every recorded step sees the same batch.
      cache: folder for plain histories, or None.
    """
    chosen = VICTIMS[victim]
    history = cached_train(chosen, seed, steps, batch=batch, repeat=repeat, cache=cache)
    return blind_history(history, chosen, scheme, seed)
