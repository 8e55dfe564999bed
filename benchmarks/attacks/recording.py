"""Traces of the library itself: a shielded training step under `tempo.testing.host_view`.

The products that the host ran are told apart by their shapes and their order, which the host
knows as well: forward products come in forward order, and a backward product shares a blinded
operand with its forward one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import jax
import numpy as np
import optax
from jax.extend.core import primitives

import tempo_jax as tempo
from benchmarks.attacks import audit, traces
from benchmarks.attacks.traces import ProductTruth, ProductView, Trace
from benchmarks.attacks.victims import VICTIMS, Patched, Plain, unfolded
from tempo_jax.testing import Product


@dataclasses.dataclass(eq=False)
class _Matrices:
    """An offloaded equation as a product of matrices ``left @ right == result``.

    A convolution has None for matrices, a batched product one entry for each batch index.
    """

    source: Product
    left: list[np.ndarray]
    right: list[np.ndarray]
    result: list[np.ndarray]
    used: bool = False


def _as_matrices(product: Product) -> _Matrices:
    """Moves batch axes to the front and joins free and contracted ones."""
    if product.primitive is not primitives.dot_general_p:
        return _Matrices(product, [], [], [])
    (left_contracts, right_contracts), (left_batch, right_batch) = product.params[
        "dimension_numbers"
    ]

    def arrange(x: np.ndarray, batch, contracts, *, last: bool) -> np.ndarray:
        free = [a for a in range(x.ndim) if a not in (*batch, *contracts)]
        order = [*batch, *free, *contracts] if last else [*batch, *contracts, *free]
        count = int(np.prod([x.shape[a] for a in batch]))
        depth = int(np.prod([x.shape[a] for a in contracts]))
        shape = (count, -1, depth) if last else (count, depth, -1)
        return np.asarray(x, np.float64).transpose(order).reshape(shape)

    left = arrange(product.operands[0], left_batch, left_contracts, last=True)
    right = arrange(product.operands[1], right_batch, right_contracts, last=False)
    result = np.asarray(product.result, np.float64)
    result = result.reshape(len(left), left.shape[1], right.shape[2])
    return _Matrices(product, list(left), list(right), list(result))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b))


def _partner(
    matrices: list[_Matrices], left: np.ndarray, right: np.ndarray
) -> tuple[_Matrices, int, bool] | None:
    """Finds an unused product with one of these as its operand on that side.

    Returns:
      The product, which of its batch, and whether it was found on the left.
    """
    for m in matrices:
        if m.used:
            continue
        for i, (first, second) in enumerate(zip(m.left, m.right, strict=True)):
            if _same(first, left):
                return m, i, True
            if _same(second, right):
                return m, i, False
    return None


def _fits(m: _Matrices, w_shape: tuple[int, int], rows: int) -> bool:
    """Whether a product could be a forward one; decoys may have added rows."""
    return bool(m.left) and m.right[0].shape == w_shape and 0 <= len(m.left[0]) - rows <= 128


def match_step(
    products: list[Product], history: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> tuple[dict[str, ProductView], dict[str, tuple[Product, int]]]:
    """Finds the views of one step's products by shape, order and shared operands.

    Args:
      products: offloaded equations of one step, in the order in which they ran.
      history: plain operands by product, of which only names and shapes are read.

    Returns:
      The views, and for each that comes from a product of matrices the equation and the index
      in its batch.
    """
    sources: dict[str, tuple[Product, int]] = {}
    matrices = [_as_matrices(product) for product in products]
    views: dict[str, ProductView] = {}
    names = list(history)
    while names:
        base = names[0].split(".")[0]
        group = [n for n in names if n.split(".")[0] == base]
        names = [n for n in names if n not in group]
        x, w, _ = history[group[0]]
        forward = next(
            (
                m
                for m in matrices
                if not m.used and len(m.left) == len(group) and _fits(m, w.shape, len(x))
            ),
            None,
        )
        if forward is not None:
            forward.used = True
            for i, (name, *operands) in enumerate(
                zip(group, forward.left, forward.right, forward.result, strict=True)
            ):
                sources[name] = forward.source, i
                views[name] = ProductView(*operands, None, None, None)  # pyright: ignore
        else:
            view = _match_convolution(matrices, x, w)
            if view is not None:
                views[group[0]] = view
    # Backward products last: an input and a gradient may have one shape.
    for view in views.values():
        _match_backward(matrices, view)
    for view in reversed(views.values()):
        _match_duals(matrices, view)
    return views, sources


def _match_backward(matrices: list[_Matrices], view: ProductView) -> None:
    """Fills in g, dx and dw; `_as_matrices` has what is contracted last on the left, else first."""
    assert view.x is not None and view.w is not None
    if view.g is None:
        found = _partner(matrices, view.x.T, view.x)
        if found is not None:
            product, i, left = found
            view.g = product.right[i] if left else product.left[i].T
            view.dw = product.result[i] if left else product.result[i].T
            _match_other_gradient(matrices, view)
        else:
            # Without a shared x, as where dw is computed from second versions of x and g.
            found = _partner(matrices, view.w, view.w.T)
            if found is not None:
                product, i, left = found
                product.used = True
                view.g = product.right[i].T if left else product.left[i]
    if view.g_under_w is not None:
        view.dx = view.g_under_w @ view.w.T
        view.dw = view.x.T @ view.g if view.dw is None else view.dw


def _match_other_gradient(matrices: list[_Matrices], view: ProductView) -> None:
    """Fills in g as it is for dX, if that is not as it is for dW."""
    assert view.w is not None and view.g is not None
    found = _partner(matrices, view.w, view.w.T)
    if found is not None:
        product, i, left = found
        gradient = product.right[i].T if left else product.left[i]
        if not _same(gradient, view.g):
            view.g_of_dx = gradient


def _match_duals(matrices: list[_Matrices], view: ProductView) -> None:
    """Finds second versions of x and g by their shapes, the last layer's first, as they ran.

    Where the gradient of x is not computed, that of y is seen in this version alone.
    """
    assert view.x is not None and view.w is not None
    if _partner(matrices, view.x.T, view.x) is not None:
        return
    for m in matrices:
        if m.used or len(m.left) != 1:
            continue
        # JAX writes the gradient of y first, which tells them apart where both are square.
        for left, right in ((m.right[0], m.left[0].T), (m.left[0].T, m.right[0])):
            if left.shape == view.x.shape and right.shape == (len(view.x), view.w.shape[1]):
                m.used = True
                view.x_dual, view.g_dual, view.dw = left, right, left.T @ right
                if view.g is None:
                    view.g, view.dx = right, right @ view.w.T
                return


def _match_convolution(
    matrices: list[_Matrices], x: np.ndarray, w: np.ndarray
) -> ProductView | None:
    """Finds a 3×3 convolution whose patches have these shapes, and the one that gives dW."""
    channels = w.shape[0] // 9
    for m in matrices:
        if m.used or m.left or m.source.operands[0].ndim != 4:
            continue
        numbers = m.source.params["dimension_numbers"]
        image = np.transpose(m.source.operands[0], [numbers.lhs_spec[i] for i in (0, 2, 3, 1)])
        kernel = np.transpose(m.source.operands[1], [numbers.rhs_spec[i] for i in (2, 3, 1, 0)])
        if kernel.shape != (3, 3, channels, w.shape[1]) or image.size * 9 != x.size:
            continue
        m.used = True
        result = np.transpose(m.source.result, [numbers.out_spec[i] for i in (0, 2, 3, 1)])
        image, kernel, result = (np.asarray(v, np.float64) for v in (image, kernel, result))
        view = ProductView(
            unfolded(image, (3, 3)),
            kernel.reshape(w.shape),
            result.reshape(-1, w.shape[1]),
            None,
            None,
            None,
        )
        for other in matrices:
            operands = other.source.operands
            shared = [i for i, o in enumerate(operands) if _same(o, m.source.operands[0])]
            if other is m or other.left or not shared:
                continue
            # The gradient lies with batch, height, width and channels in the result's order.
            gradient = np.asarray(operands[1 - shared[0]], np.float64)
            gradient = np.transpose(gradient, [numbers.out_spec[i] for i in (0, 2, 3, 1)])
            if gradient.shape == result.shape:
                view.g = gradient.reshape(-1, w.shape[1])
        return view
    return None


def record(
    victim: str,
    scheme: tempo.schemes.Scheme,
    seed: int,
    steps: int,
    *,
    batch: int | None = None,
    cache: pathlib.Path | None = traces.CACHE,
) -> Trace:
    """Trains a victim under the library and keeps what the host saw.

    Args:
      victim: key of `VICTIMS`.
      scheme: of the library.
      seed: of weights, batches and the enclave's root secret.
      steps: recorded steps, after the victim's warm-up in the clear; Adam's, or where the scheme
        keeps no weight on the devices under Adam, those of SGD with momentum.
      batch: examples in a step; the victim's own by default.
      cache: folder for plain histories, or None.
    """
    chosen = VICTIMS[victim]
    # Weights that stay on the devices show most, and under most groups Adam's do not.
    linear = not (scheme.group.elementwise or scheme.keys_per_product)
    history = traces.cached_train(chosen, seed, steps, batch=batch, linear=linear, cache=cache)
    drawn = traces.batches(chosen, seed, steps, batch or chosen.batch, repeat=False)
    optimizer, state = traces.start(chosen, seed, drawn, linear=linear)
    optimizer = tempo.cheap_update(optimizer)

    products = Patched() if scheme.keys_per_product else Plain()

    def step(state, inputs, labels):
        parameters, moments = state
        gradients = jax.grad(chosen.loss)(parameters, inputs, labels, products)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    # The evaluator's choice, so that a second run sees the same bytes.
    root = hashlib.sha256(f"{scheme.name}/{victim}/{seed}".encode()).digest()
    views, truths = [], []
    with audit.launch(root) as enclave:
        shielded = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
        state = enclave.seal(state)
        for number in range(steps):
            # One recording a step, so that its arrays can be let go.
            with tempo.testing.host_view() as seen:
                plan = shielded.explain(state, history.inputs[number], history.labels[number]).plan
                state = shielded(state, history.inputs[number], history.labels[number])
            seen_views, sources = match_step(seen.products, history.steps[number])
            views.append(seen_views)
            auditor = audit.Auditor(plan, root)
            truth = {name: ProductTruth(*x) for name, x in history.steps[number].items()}
            for name, source in sources.items():
                view = seen_views[name]
                if not auditor.fill_in(number + 1, *source, view, truth[name]):
                    del seen_views[name]
            truths.append(truth)
    return Trace(
        scheme.name,
        victim,
        seed,
        history.names,
        views,
        truths,
        history.parameters,
        history.inputs,
        history.labels,
        recorded=True,
    )
