"""What `verify=True` notices: how small an error, and what it costs in memory.

Untrusted and pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from enclave_runtime.protocol.descriptions import (
    VECTORS,
    block_width,
    checksum_limit,
    checksum_resolution,
    checksum_width,
    resolution,
    unit_roundoff,
)
from enclave_runtime.protocol.program import ArrayType, Crossing
from enclave_runtime.protocol.updates import AxisNumbers, free_axes


def smallest_error(
    crossing: Crossing, sent: Mapping[int, ArrayType], leaves: Mapping[int, ArrayType]
) -> float:
    """The smallest error that the check of a product notices, over the RMS of its row."""
    assert crossing.product is not None and crossing.operands is not None
    lhs, rhs = (sent[v] for v in crossing.operands)
    rounding = roundoff(crossing, sent)
    for which, value in enumerate(crossing.operands):
        if value in leaves:
            _, axes = free_axes(crossing.product, (len(lhs.shape), len(rhs.shape)), which)
            return checksum_resolution(*_checksum_sizes(leaves[value], axes), rounding)
    terms, columns = crossing.product.sizes(lhs.shape, rhs.shape)
    return resolution(terms, block_width(terms, columns, rounding), rounding)


def _checksum_sizes(array: ArrayType, axes: AxisNumbers) -> tuple[int, int]:
    """Rows of a leaf's projection, and how many columns are combined."""
    columns = math.prod(array.shape[a] for a in axes)
    terms = array.size // columns
    return terms, checksum_width(terms, columns, unit_roundoff(array.dtype))


def runs_until_renewed(array: ArrayType, axes: AxisNumbers) -> int:
    """Calls after which a leaf's checksum has to be made anew."""
    return checksum_limit(*_checksum_sizes(array, axes), unit_roundoff(array.dtype))


def checksum_bytes(array: ArrayType, axes: AxisNumbers) -> int:
    """Float64 values and bounds of each row and block."""
    terms, width = _checksum_sizes(array, axes)
    return 8 * terms * -(-(array.size // terms) // width) * (VECTORS + 1)


def roundoff(crossing: Crossing, sent: Mapping[int, ArrayType]) -> float:
    """Unit roundoff of a product's least exact format."""
    assert crossing.operands is not None
    types = (*(sent[v] for v in crossing.operands), crossing.blinded)
    return unit_roundoff(*(t.dtype for t in types))
