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
from benchmarks.attacks.blinding import DenseKey
from benchmarks.attacks.coordinates import evened_operands
from benchmarks.attacks.open_enclave import ROOT_VARIABLE
from benchmarks.attacks.traces import Powers, ProductTruth, ProductView
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import DEVICE, Layout
from enclave_runtime.schemes.equilibration import AxisScales, axis_factors, equilibrate
from enclave_runtime.schemes.kernels.hadamard import AxisMap
from tempo_jax.planning.plan import Plan
from tempo_jax.schemes import Mixing
from tempo_jax.testing import Product
from tempo_jax.transport import launch as launch_module

LUCK = 5  # standard errors of the cosine between unrelated matrices


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
          truth: the plain operands; gets keys with the powers of two that even out, scalars and
            decoys. Under masks of full rank scalars are the best fit.
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
        if getattr(self._scheme, "mask_energy", 0):
            return _fill_in_masked(drawn, _powers_of_two(drawn, x, w, truth), view, truth)
        evens = isinstance(self._scheme, Mixing)
        for powers in _powers_of_two(drawn, x, w, truth) if evens else [None]:
            if self._fits(_times(drawn, powers), view, truth):
                truth.powers = powers
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


def _powers_of_two(
    keys: tuple[DenseKey, DenseKey, DenseKey], x: Layout, w: Layout, truth: ProductTruth
) -> Iterator[Powers]:
    """The powers of two that even out a product's operands, for each order of the two."""
    operands = (truth.x, x.parities[-2:], (0, 1)), (truth.w, w.parities[-2:], (1, 2))
    parities = (*x.parities[-2:], w.parities[-1])
    for order in ((0, 1), (1, 0)):
        scales = [AxisScales(1) for _ in keys]
        for plain, (first, second), (row, column) in (operands[i] for i in order):
            equilibrate(np.asarray(plain), (scales[row], scales[column]), (first, second))
        a, b, c = (axis_factors(s, p)[0] for s, p in zip(scales, parities, strict=True))
        yield a, b, c


def _times(
    keys: tuple[DenseKey, DenseKey, DenseKey], powers: Powers | None
) -> tuple[DenseKey, DenseKey, DenseKey]:
    """The keys as they act on plain operands."""
    if powers is None:
        return keys
    a, b, c = (
        # Decoys, which are behind all others, have none.
        DenseKey(key.matrix * np.pad(f, (0, key.size - len(f)), constant_values=1))
        for key, f in zip(keys, powers, strict=True)
    )
    return a, b, c


def _fill_in_masked(
    keys: tuple[DenseKey, DenseKey, DenseKey],
    candidates: Iterator[Powers],
    view: ProductView,
    truth: ProductTruth,
) -> bool:
    """Completes the truth on a product whose operands have masks of full rank."""
    assert view.x is not None and view.w is not None
    a, b, c = (key.matrix for key in keys)
    seen = [np.linalg.solve(a, view.x) @ np.linalg.inv(b).T, b.T @ view.w @ np.linalg.inv(c).T]
    if view.g is not None:
        seen.append(a.T @ view.g @ c)
    best = 0.0
    for powers in candidates:
        # Masks go over what is evened out, so that it shows there.
        plain = evened_operands(truth, powers)
        sizes = [np.linalg.norm(s) * np.linalg.norm(p) for s, p in zip(seen, plain, strict=False)]
        alike = [
            float((s * p).sum()) / size if size else 0.0
            for s, p, size in zip(seen, plain, sizes, strict=False)
        ]
        # Under a wrong key the two have nothing to do with each other.
        found = all(
            abs(cosine) * np.sqrt(p.size) >= LUCK or not size
            for cosine, p, size in zip(alike[:2], plain, sizes, strict=False)
        )
        if found and sum(alike) > best:
            best, truth.powers, truth.keys = sum(alike), powers, _times(keys, powers)
            ratios = [_ratio(s, p) for s, p in zip(seen, plain, strict=False)]
            truth.scales = (ratios[0], ratios[1], ratios[2] if view.g is not None else 1.0)
    return bool(best > 0)


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
