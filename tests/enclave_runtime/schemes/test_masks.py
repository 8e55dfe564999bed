"""Masks of full rank: taken off exactly, of the energy that was asked, and fresh in every draw."""

from typing import Any

import numpy as np
import pytest

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol.program import KeyClass, Layout
from enclave_runtime.schemes import Mixing, masks

SHAPES = [((128, 64, 96), 1), ((150, 200, 70), 1), ((130, 65, 300), 3), ((256, 100, 64), 2)]


def stream(number: int = 0) -> KeyStream:
    return KeyStream(bytes([number]) * 32)


def transposed(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)


def operands(shape: tuple[int, int, int], copies: int, dtype: Any) -> list[np.ndarray]:
    rng, (m, n, p) = np.random.default_rng(0), shape
    batch = (copies,) if copies > 1 else ()
    return [rng.normal(size=(*batch, *s)).astype(dtype) for s in ((m, n), (n, p), (m, p))]


def products(scheme: Mixing, x: Any, w: Any, g: Any) -> list[np.ndarray]:
    """Y, dX and dW from blinded operands."""
    copies, draws = (len(x) if x.ndim == 3 else 1), stream()
    batch, zeros = (None,) * (x.ndim - 2), (0,) * (x.ndim - 2)
    sizes = x.shape[-2], x.shape[-1], w.shape[-1]
    keys = {i: scheme.draw(KeyClass(n, copies=copies), draws) for i, n in enumerate(sizes)}

    def layout(classes: tuple[int, int], parities: tuple[int, int]) -> Layout:
        return Layout((*batch, *classes), (*zeros, *parities))

    def blind(plain: np.ndarray, of: Layout) -> tuple[np.ndarray, Any]:
        out = np.empty_like(plain)
        return out, scheme.blind(plain, of, keys, out, lambda: draws)

    blinded_x, of_x = blind(x, layout((0, 1), (1, 1)))
    blinded_w, of_w = blind(w, layout((1, 2), (0, 1)))
    blinded_g, of_g = blind(g, layout((0, 2), (0, 0)))
    cases = [
        (blinded_x @ blinded_w, layout((0, 2), (1, 1)), (of_x, of_w)),
        (blinded_g @ transposed(blinded_w), layout((0, 1), (0, 0)), (of_g, of_w)),
        (transposed(blinded_x) @ blinded_g, layout((1, 2), (1, 0)), (of_x, of_g)),
    ]
    return [np.asarray(scheme.unblind(y, of, keys, of_both)) for y, of, of_both in cases]


def errors(scheme: Mixing, x: Any, w: Any, g: Any) -> list[float]:
    """Relative errors, of each leading index the worst."""
    wide = [v.astype(np.float64) for v in (x, w, g)]
    exact = wide[0] @ wide[1], wide[2] @ transposed(wide[1]), transposed(wide[0]) @ wide[2]
    return [
        float((np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))).max())
        for a, b in zip(products(scheme, x, w, g), exact, strict=True)
    ]


@pytest.mark.parametrize(("shape", "copies"), SHAPES)
@pytest.mark.parametrize("energy", [9.0, 36.0])
def test_all_three_products_come_back(shape, copies, energy):
    assert max(errors(Mixing(mask_energy=energy), *operands(shape, copies, np.float64))) < 1e-12


def test_rounding_in_float32():
    found = errors(Mixing(), *operands((512, 512, 512), 1, np.float32))
    assert max(found) < 1e-5
    assert max(found) > max(errors(Mixing(mask_energy=0), *operands((512, 512, 512), 1, "f4")))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_operands_of_any_size(scale):
    x, w, g = operands((128, 64, 64), 1, np.float32)
    assert max(errors(Mixing(), x * np.float32(scale), w, g)) < 2e-5


def test_indices_of_any_size_do_not_spoil_each_other():
    x, w, g = operands((128, 64, 64), 3, np.float32)
    x[1] *= 1e4
    x[2] = 0
    y, _, dw = products(Mixing(), x, w, g)
    assert not y[2].any() and not dw[2].any(), "an operand of zeros gives zeros"
    for i in range(2):
        exact = x[i].astype(np.float64) @ w[i]
        assert np.linalg.norm(y[i] - exact) < 2e-5 * np.linalg.norm(exact)


def dense(mask: masks.Mask) -> np.ndarray:
    """A mask, its maps multiplied as matrices: (copies, m, n)."""
    short = min(mask.rows.size, mask.columns.size)
    copies = [
        mask.rows.dense(copy)[:, :short] @ mask.columns.dense(copy)[:short]
        for copy in range(mask.rows.copies)
    ]
    return np.stack(copies) - mask.left @ transposed(mask.right)


def cover(
    x: np.ndarray, energy: float, strongest: int, draws: KeyStream
) -> tuple[np.ndarray, masks.Mask]:
    """The tensor with a mask, and the mask."""
    whole = np.square(x).sum((-2, -1), keepdims=True)
    draft, _ = masks.draw(x, whole, energy, strongest, draws)
    mask = draft.mask(transposed(x) @ draft.along)
    return x + dense(mask).reshape(x.shape), mask


@pytest.mark.parametrize("shape", [(192, 64), (64, 192), (100, 130), (2, 128, 64)])
def test_a_mask_has_full_rank_and_its_energy_at_every_index(shape):
    x = np.random.default_rng(0).normal(size=shape)
    x[0] *= 30
    seen, mask = cover(x, 9.0, 0, stream())
    added = (seen - x).reshape(-1, *shape[-2:])
    for one, plain in zip(added, x.reshape(added.shape), strict=True):
        assert np.linalg.matrix_rank(one) == min(shape[-2:])
        assert np.square(one).sum() == pytest.approx(9 * np.square(plain).sum())
    assert mask.left.shape[-1] == mask.right.shape[-1] == 0


@pytest.mark.parametrize(
    ("shape", "energy"), [((256, 600), 15), ((2, 64, 96), 15), ((257, 300), 10)]
)
def test_narrow_tensors_have_more_energy(shape, energy):
    scheme, draws, copies = Mixing(traded=0), stream(), shape[0] if len(shape) == 3 else 1
    x = np.random.default_rng(0).normal(size=shape)
    sizes = enumerate(shape[-2:])
    keys = {i: scheme.draw(KeyClass(n, copies=copies), draws) for i, n in sizes}
    of = Layout((*(None for _ in shape[2:]), 0, 1), (*(0 for _ in shape[2:]), 1, 1))
    covered = scheme.blind(x, of, keys, np.empty_like(x), lambda: draws).masked
    assert covered is not None
    added = np.square(dense(covered.mask)).sum()
    assert added == pytest.approx(energy * np.square(x).sum())


@pytest.mark.parametrize(("side", "count"), [(20, 5), (64, 8), (127, 8), (128, 16), (600, 16)])
def test_more_directions_of_wider_tensors_are_taken_down(side, count):
    x = np.random.default_rng(0).normal(size=(side, 640))
    assert cover(x, 15.0, 8, stream())[1].left.shape == (side, count)


def test_strong_directions_do_not_stick_out():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 256)) + 3.0
    strong = np.linalg.svd(x)[0][:, 0]
    for count, stands in ((0, True), (8, False)):
        seen, _ = cover(x, 9.0, count, stream())
        left, sizes, _ = np.linalg.svd(seen)
        assert (np.abs(left[:, :4].T @ strong).max() > 0.9) == stands
        assert (sizes[0] > 1.5 * sizes[1]) == stands


def test_spectra_of_masks_differ_as_much_at_any_size():
    """Their scales come from a random distribution, or the moments would be alike at 1/√n."""

    def spread(size: int, count: int) -> float:
        zeros, found = np.zeros((size, size)), []
        for number in range(count):
            sizes = np.linalg.svd(cover(zeros, 9.0, 0, stream(number))[0], compute_uv=False)
            energies = sizes**2 / np.square(sizes).mean()
            found.append(np.log(np.square(energies).mean()))
        return float(np.std(found))

    assert spread(512, 24) > 0.5 * spread(64, 24) > 0.05


def test_scales_stay_within_their_condition():
    scales = masks._random_scales(stream(), 5, 1000)
    assert scales.max() / scales.min() <= masks.CONDITION
    # A few values make up most of each: 3 of them about half.
    for row in scales:
        _, counts = np.unique(row, return_counts=True)
        assert np.sort(counts)[-12:].sum() > 800


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_tensor_of_low_rank_is_covered(rank):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, rank)) @ rng.normal(size=(rank, 64))
    x = x.astype(np.float32)
    seen, _ = cover(x, 9.0, 8, stream())
    sizes = np.linalg.svd(seen, compute_uv=False)
    assert sizes[0] < 10 * sizes[len(sizes) // 2]
    along = np.linalg.svd(x)[0][:, :rank]
    assert np.linalg.norm(along.T @ seen) < 0.5 * np.linalg.norm(seen)


def test_masks_are_fresh_and_secret():
    x = np.random.default_rng(0).normal(size=(64, 64))
    first, second = (cover(x, 9.0, 8, stream(n)) for n in (1, 2))
    a, b = (seen - x for seen, _ in (first, second))
    assert abs((a * b).sum()) < 0.1 * np.linalg.norm(a) * np.linalg.norm(b)
    assert repr(first[1]) == "Mask(<secret>)"


@pytest.mark.parametrize("size", [1, 5, 64, 100, 130, 200])
def test_energies_of_maps_are_told_from_their_scales(size):
    for flat in (False, True):
        drawn = masks._draw_map(stream(), size, 2, flat=flat)
        exact = [np.square(drawn.dense(copy)).sum() for copy in range(2)]
        np.testing.assert_allclose(masks._map_energies(drawn), exact)
