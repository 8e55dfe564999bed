"""Blinding schemes as the planner sees them; their arithmetic is `enclave_runtime.schemes`.

A scheme is two halves that share a name: here its contract (which keys may be kept, which
products may share them, what blinding costs), there the group's action. The planner reads
nothing else about a scheme.
"""

from __future__ import annotations

import abc
import dataclasses
import enum


class KeyLifetime(enum.Enum):
    """How long the key of a device-resident weight lives."""

    STEP = "step"  # every key is fresh at every step, so nothing is device-resident
    KEPT = "kept"  # kept as long as the weight stays on the devices


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    """What placement and key solving need to know of a scheme.

    Attributes:
      name: module name in `enclave_runtime.schemes`.
      lifetime: of the keys of device-resident weights.
      polarities: 1 if the group is orthogonal, so that key and inverse-transpose key
        are the same; 2 if contraction pairs opposite polarities.
      shares_classes: whether several products may use one blinding of a value.
      decoy_rows: rows that the scheme appends to operands.
      nanoseconds_per_element: the enclave's cost of blinding or unblinding one element.
      host_learns: one sentence for `explain`.
    """

    name: str
    lifetime: KeyLifetime
    polarities: int
    shares_classes: bool
    decoy_rows: int
    nanoseconds_per_element: float
    host_learns: str


@dataclasses.dataclass(frozen=True)
class SignedPermutation(Scheme):
    """Obfuscation without confidentiality: rows and columns permuted, their signs flipped.

    ``X̂[i, j] = s_a(i) s_b(j) X[π_a(i), π_b(j)]``. Exact in every float format, cheap (about
    half a nanosecond an element), and equivariant under every odd elementwise optimizer, so
    weights stay on the devices. **It does not protect against a host that tries**: one batch links
    adjacent layers, a public checkpoint or one known input reveals the key, and inputs and
    labels can be recovered. It hides the names of rows and columns.
    """

    name: str = dataclasses.field(default="signed_permutation", init=False)
    lifetime: KeyLifetime = dataclasses.field(default=KeyLifetime.KEPT, init=False)
    polarities: int = dataclasses.field(default=1, init=False)
    shares_classes: bool = dataclasses.field(default=True, init=False)
    decoy_rows: int = dataclasses.field(default=0, init=False)
    nanoseconds_per_element: float = dataclasses.field(default=0.6, init=False)
    host_learns: str = dataclasses.field(
        default=(
            "every blinded matrix up to the order and signs of its rows and columns, which is "
            "enough to rebuild the model and most inputs: obfuscation, not confidentiality"
        ),
        init=False,
    )
