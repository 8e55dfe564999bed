"""What the enclave is told of a product it checks, and how small an error a check notices.

Plain data and formulas without secret state; both sides use them, `integrity` carries the
checks out. A check compares random combinations of the result's columns with those that the
operands give. Its tolerance has to let the device's rounding pass, and that grows with the
number of columns combined, so wide results are checked in blocks of columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from enclave_runtime.protocol.fields import MAX_RANK, items, natural, pair, require

VECTORS = 16  # independent sign vectors for each block: errors escape with 2**-VECTORS
# Rounding of t terms and of a sum of w columns is a walk of (t + w) steps, each at most u of a
# partial sum: 0.52 u sqrt(t + w) of the row's norm, one standard deviation, if the device adds up
# one term after another. This is 9.6 of those; what exceeds it is looked at more closely.
ROUNDING = 5.0
# An element may be off by this many unit roundoffs of itself and its terms together.
ELEMENT_ROUNDING = 2048.0
# Blocks are narrow enough that a check notices an error of this size, over the RMS of its row, in
# an element that is not much larger than that itself.
RESOLUTION = 5e-4
# What a checksum of a leaf on the devices lets pass, see `checksum`.
CHECKSUM_WIDTH = 128  # columns that are combined at most
CHECKSUM_ROUNDING = 2.0  # times the tolerance of other products: nobody can look closer
DRIFT = 5.0  # times the most that rounding may have changed a leaf since it was blinded
MAX_DRIFT = 4e-4  # of the RMS of a product's row, in an element
MAX_UPDATES_FOLLOWED = 16
_LIMIT = 1 << 31


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """A `jax.lax.dot_general`.

    Attributes:
      contract: axes of the left and of the right operand that are summed over.
      batch: likewise those that run along.
    """

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    def sizes(self, lhs: Sequence[int], rhs: Sequence[int]) -> tuple[int, int]:
        """Terms of each element's sum, and columns: the right operand's free elements."""
        terms = math.prod(rhs[i] for i in self.contract[1])
        batch = math.prod(rhs[i] for i in self.batch[1])
        return terms, math.prod(rhs) // max(1, terms * batch)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A `jax.lax.conv_general_dilated`.

    Attributes:
      strides: of the window.
      padding: low and high, for each spatial axis.
      lhs_dilation: of the left operand.
      rhs_dilation: of the kernel.
      lhs: the left operand's batch, feature and spatial axes.
      rhs: the kernel's output-feature, input-feature and spatial axes.
      out: the result's batch, feature and spatial axes.
      feature_groups: of features.
      batch_groups: of the batch.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    feature_groups: int
    batch_groups: int

    @property
    def groups(self) -> int:
        """Parts of the output features that see different parts of the left operand."""
        return self.feature_groups * self.batch_groups

    def sizes(self, lhs: Sequence[int], rhs: Sequence[int]) -> tuple[int, int]:
        """Terms of each element's sum, and columns: the output features of a group."""
        terms = math.prod(rhs[i] for i in self.rhs[1:])
        return terms, rhs[self.rhs[0]] // self.groups


ProductDescription = DotGeneral | Convolution


def decode_product(fields: Any) -> ProductDescription:
    """Reads what `dataclasses.asdict` wrote.

    Whether it fits its operands is checked by `following.check_program`.
    """
    require(isinstance(fields, dict), "a product is not an object")

    def axes(value: Any) -> tuple[int, ...]:
        listed = items(value, "axes")
        require(len(listed) <= MAX_RANK, "a rank is too large")
        return tuple(natural(i, MAX_RANK, "an axis") for i in listed)

    if "contract" in fields:
        left, right = map(axes, pair(fields["contract"]))
        left_batch, right_batch = map(axes, pair(fields.get("batch")))
        return DotGeneral((left, right), (left_batch, right_batch))

    def positive(value: Any, what: str) -> int:
        return 1 + natural(value - 1 if type(value) is int else value, _LIMIT, what)

    def numbers(key: str) -> tuple[int, ...]:
        listed = items(fields.get(key), key)
        require(len(listed) <= MAX_RANK, "a rank is too large")
        return tuple(positive(n, key) for n in listed)

    def padding(value: Any) -> tuple[int, int]:
        low, high = pair(value)
        for n in (low, high):
            require(type(n) is int and -_LIMIT < n < _LIMIT, "a padding is out of range")
        return low, high

    padded = items(fields.get("padding"), "padding")
    require(len(padded) <= MAX_RANK, "a rank is too large")
    decoded = Convolution(
        numbers("strides"),
        tuple(map(padding, padded)),
        numbers("lhs_dilation"),
        numbers("rhs_dilation"),
        axes(fields.get("lhs")),
        axes(fields.get("rhs")),
        axes(fields.get("out")),
        positive(fields.get("feature_groups"), "feature_groups"),
        positive(fields.get("batch_groups"), "batch_groups"),
    )
    rank = len(decoded.lhs)
    require(rank >= 2, "a convolution has too few axes")
    for order in (decoded.lhs, decoded.rhs, decoded.out):
        require(sorted(order) == list(range(rank)), "a convolution's axes are not an order")
    return decoded


def unit_roundoff(*dtypes: str) -> float:
    """The largest relative rounding error, in the least exact format; 16 bits add in float32."""
    wide = (np.dtype(np.float64 if np.dtype(d) == np.float64 else np.float32) for d in dtypes)
    return max(float(np.finfo(d).eps) / 2 for d in wide)


def rounding(terms: int, width: int, unit: float) -> float:
    """The tolerance over ``√(‖S‖² + ‖Y‖²)``; see `integrity`."""
    return ROUNDING * unit * math.sqrt(terms + width)


def resolution(terms: int, width: int, unit: float) -> float:
    """The tolerance over the RMS of a row of like elements whose terms do not cancel.

    So S is like Y, and s like y; see `integrity`. It is the larger one of the two.
    """
    combined = rounding(terms, width, unit) * math.sqrt(2 * width)
    return max(combined, ELEMENT_ROUNDING * unit * math.sqrt(2))


def block_width(terms: int, columns: int, unit: float) -> int:
    """How many columns are combined: all, or so many that `RESOLUTION` is kept."""
    width = max(columns, 1)
    while width > 1 and resolution(terms, width, unit) > RESOLUTION:
        width = -(-width // 2)
    return width


def checksum_width(terms: int, columns: int, unit: float) -> int:
    """How many columns of a leaf are combined, for sums of so many terms."""
    width = min(max(columns, 1), CHECKSUM_WIDTH)
    while width > 1 and _combined(terms, width, unit) > RESOLUTION:
        width = -(-width // 2)
    return width


def _combined(terms: int, width: int, unit: float) -> float:
    return CHECKSUM_ROUNDING * rounding(terms, width, unit) * math.sqrt(2 * width)


def checksum_limit(terms: int, width: int, unit: float) -> int:
    """Runs that may use a leaf before it is blinded anew; each may update it once."""
    drift = DRIFT * unit * math.sqrt(terms * width)
    return 1 + min(int(MAX_DRIFT / drift), MAX_UPDATES_FOLLOWED - 1)


def checksum_resolution(terms: int, width: int, unit: float) -> float:
    """As `resolution`, for a product with a leaf on the devices just before it is blinded anew."""
    updates = checksum_limit(terms, width, unit) - 1
    drift = DRIFT * updates * unit * math.sqrt(terms * width)
    return _combined(terms, width, unit) + drift
