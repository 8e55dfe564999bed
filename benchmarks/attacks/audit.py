"""Keys of the library's own runs, derived again by an evaluator who knows the enclave's root.

Used to score attacks, never by one: `launch` starts an enclave whose root secret this process
chose, and `Auditor` derives from it what the enclave drew, by the numbers of run and key class.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import numpy as np

import tempo_jax as tempo
from benchmarks.attacks.blinding import Key
from benchmarks.attacks.open_enclave import ROOT_VARIABLE
from benchmarks.attacks.traces import ProductTruth, ProductView
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import DEVICE, Layout
from enclave_runtime.schemes.equilibration import (
    REMOVED,
    AxisScales,
    axis_factors,
    equilibrate,
)
from enclave_runtime.schemes.kernels.hadamard import AxisMap
from tempo_jax.planning.plan import Plan
from tempo_jax.schemes import Mixing
from tempo_jax.testing import Product
from tempo_jax.transport import launch as launch_module

LUCK = 5  # standard errors of the cosine between unrelated matrices


class DenseKey(Key):
    """A key given as its matrix."""

    def __init__(self, matrix: np.ndarray):
        """Keeps the matrix, (n, n)."""
        object.__setattr__(self, "size", len(matrix))
        object.__setattr__(self, "stages", ())
        object.__setattr__(self, "matrix", matrix)

    def apply(self, x: np.ndarray, *, polar: bool = False) -> np.ndarray:
        """See `Key.apply`."""
        return np.linalg.solve(self.matrix.T, x) if polar else self.matrix @ x


@contextlib.contextmanager
def launch(root: bytes) -> Iterator[tempo.Enclave]:
    """Starts an enclave with this root secret, 32 bytes."""
    with (
        mock.patch.dict(os.environ, {ROOT_VARIABLE: root.hex()}),
        mock.patch.object(launch_module, "ENCLAVE_MODULE", "benchmarks.attacks.open_enclave"),
    ):
        enclave = tempo.Enclave.launch()
    with enclave:
        yield enclave


class Auditor:
    """Derives the keys of one plan's runs, for schemes that keep none.

    Kept keys were drawn by the run that first blinded a weight, which is the first run here.
    """

    def __init__(self, plan: Plan, root: bytes):
        """Takes the shielded step's plan and the enclave's root secret."""
        self._plan = plan
        self._scheme = plan.request.scheme
        self._schedule = KeySchedule()
        self._schedule._root = root
        self._kept = {
            c for port in plan.program.inputs if port.place == DEVICE for c in port.layout.classes
        }

    def _key(self, run: int, layout: Layout, axis: int, copy: int) -> DenseKey:
        """The matrix that acts on an axis, in the polarity of the first operand."""
        number = layout.classes[axis]
        assert number is not None, "every axis of a matrix carries a key"
        budget = self._scheme.key_budget or 1 << 62
        first = run - (run - 1) % budget if number in self._kept else run
        stream = self._schedule.stream("class", first, number)
        key = self._scheme.draw(self._plan.program.classes[number], stream)
        element = getattr(key, "element", key)
        if isinstance(element, AxisMap):
            matrix = element.dense(copy if element.copies > 1 else 0)
        else:
            matrix = np.eye(len(element.permutation))[element.permutation]
            if element.factors is not None:
                matrix *= np.asarray(element.factors, np.float64)[:, None]
        if not self._scheme.group.orthogonal and not layout.parities[axis]:
            matrix = np.linalg.inv(matrix).T
        return DenseKey(matrix)

    def fill_in(
        self, run: int, product: Product, copy: int, view: ProductView, truth: ProductTruth
    ) -> bool:
        """Completes the truth on a forward product of matrices that was seen in a run.

        Args:
          run: the run's number in its enclave, from 1.
          product: the forward equation as recorded.
          copy: index in its batch.
          view: what the host saw of it.
          truth: the plain operands; gets keys, scalars and decoys. Under masks of full rank
            scalars are the best fit.
        """
        eqn = self._plan.jaxpr.eqns[product.equation]
        x, w = (self._plan.layout(v) for v in eqn.invars)
        if len(x.classes) != (3 if self._scheme.keys_per_product and x.classes[0] is None else 2):
            return True
        drawn = (
            self._key(run, x, -2, copy),
            self._key(run, x, -1, copy),
            self._key(run, w, -1, copy),
        )
        # The enclave evens out sizes by what it blinds first, which may be either operand.
        for keys in _with_scales(self._scheme, drawn, x, w, truth):
            if self._fits(keys, view, truth):
                return True
        truth.keys = None
        return False

    def _fits(
        self, keys: tuple[DenseKey, DenseKey, DenseKey], view: ProductView, truth: ProductTruth
    ) -> bool:
        """Completes the truth if these are the keys."""
        a, b, c = truth.keys = keys
        assert view.x is not None and view.w is not None
        # What was drawn for a tensor alone follows from what the host saw and the keys.
        clear_x = np.linalg.solve(a.matrix, view.x) @ np.linalg.inv(b.matrix).T
        clear_w = b.matrix.T @ view.w @ np.linalg.inv(c.matrix).T
        if getattr(self._scheme, "mask_energy", 0):
            return _fill_in_masked(view, truth, clear_x, clear_w)
        rank = 2 * getattr(self._scheme, "traded", 0)
        t_x, t_w, t_g = _ratio(clear_x, truth.x), _ratio_under_mask(clear_w, truth.w), 1.0
        rest = np.linalg.svd(clear_w - t_w * truth.w, compute_uv=False)[rank:]
        if rest.max(initial=0) > 1e-6 * np.linalg.norm(clear_w):
            return False
        if len(clear_x) > len(truth.x):
            truth.decoys_x = clear_x[len(truth.x) :] / t_x
        if view.g is not None:
            clear_g = a.matrix.T @ view.g @ c.matrix
            t_g = _ratio(clear_g, truth.g)
            # Without dX, Ĝ has a key of its own for its columns.
            own = not np.allclose(clear_g[: len(truth.g)], t_g * truth.g, atol=1e-6)
            if len(clear_g) > len(truth.g) and not own:
                truth.decoys_g = clear_g[len(truth.g) :] / t_g
        truth.scales = (t_x, t_w, t_g)
        return True


def _with_scales(
    scheme: tempo.schemes.Scheme,
    keys: tuple[DenseKey, DenseKey, DenseKey],
    x: Layout,
    w: Layout,
    truth: ProductTruth,
) -> Iterator[tuple[DenseKey, DenseKey, DenseKey]]:
    """Keys with the powers of two that even out a product's operands, for each order of the two."""
    if not isinstance(scheme, Mixing) or scheme.mask_energy:
        # Masks go over what is evened out, so that attacks are scored on that.
        yield keys
        return
    operands = (truth.x, x.parities[-2:], (0, 1)), (truth.w, w.parities[-2:], (1, 2))
    parities = (*x.parities[-2:], w.parities[-1])
    for order in ((0, 1), (1, 0)):
        scales = [AxisScales(1) for _ in keys]
        for plain, (first, second), (row, column) in (operands[i] for i in order):
            equilibrate(np.asarray(plain), (scales[row], scales[column]), (first, second))
        factors = [axis_factors(s, parity)[0] for s, parity in zip(scales, parities, strict=True)]
        a, b, c = (
            # Decoys, which are behind all others, have none.
            DenseKey(key.matrix * np.pad(f, (0, key.size - len(f)), constant_values=1))
            for key, f in zip(keys, factors, strict=True)
        )
        yield a, b, c


def _fill_in_masked(
    view: ProductView, truth: ProductTruth, clear_x: np.ndarray, clear_w: np.ndarray
) -> bool:
    """Completes the truth on a product whose operands have masks of full rank."""
    clear = [(clear_x, truth.x), (clear_w, truth.w)]
    assert truth.keys is not None, "the caller has found them"
    if view.g is not None:
        clear.append((truth.keys[0].matrix.T @ view.g @ truth.keys[2].matrix, truth.g))
    for seen, plain in clear[:2]:
        # Under a wrong key the two have nothing to do with each other. What stands out may not
        # have been sent, and would be most of the plain operand.
        usual = _is_usual(plain, 1) & _is_usual(plain, 0)
        near, sent = seen[usual], plain[usual]
        size = np.linalg.norm(near) * np.linalg.norm(sent)
        if size and abs(float((near * sent).sum())) < LUCK * size / np.sqrt(sent.size):
            return False
    scales = [_ratio(seen, plain) for seen, plain in clear]
    truth.scales = (scales[0], scales[1], scales[2] if view.g is not None else 1.0)
    return True


def _is_usual(x: np.ndarray, axis: int) -> np.ndarray:
    """Where rows (axis 1) or columns (axis 0) are not far longer than most, bool of x's shape."""
    lengths = np.linalg.norm(x, axis=axis, keepdims=True)
    usual = np.median(lengths[lengths > 0]) if lengths.any() else 0.0
    return np.broadcast_to(lengths <= 2.0**REMOVED * usual, x.shape)


def _ratio(blinded: np.ndarray, plain: np.ndarray) -> float:
    """The scalar t with ``blinded = t plain``, up to rows that are not the plain's.

    What the enclave computes inside, since it would drown the rest, is zero in what is blinded.
    """
    blinded = blinded[: len(plain)]
    sent = np.abs(blinded) > 1e-12 * np.abs(blinded).max(initial=0)
    energy = float((plain[sent] ** 2).sum())
    return float((blinded[sent] * plain[sent]).sum()) / energy if energy else 1.0


def _ratio_under_mask(blinded: np.ndarray, plain: np.ndarray) -> float:
    """The scalar t with ``blinded = t (plain + mask)``, the mask of less than half the rank.

    Most eigenvalues of ``blinded plain⁺`` are t.
    """
    turned = len(plain) > plain.shape[1]
    a, b = (blinded.T, plain.T) if turned else (blinded, plain)
    return float(np.median(np.linalg.eigvals(a @ np.linalg.pinv(b)).real))
