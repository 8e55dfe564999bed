"""What a product costs the enclave inside, and what sending it out costs.

The device counts as free, so that a laptop without an accelerator makes the same plan as a
machine with one. Untrusted and pure; used by `_placement`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from tempo_jax._jaxpr import JaxprEqn, Var, dot_general_p
from tempo_jax._products import work
from tempo_jax.schemes import Scheme


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Speeds of the enclave's side, for two cores of a current server.

    Attributes:
      dot_flops: of matrix products, per second.
      convolution_flops: of convolutions, per second.
      nanoseconds_per_byte: of moving a tensor through shared memory into the host program.
      latency: seconds that one more product adds to a round trip.
    """

    dot_flops: float = 1e11
    convolution_flops: float = 6e10
    nanoseconds_per_byte: float = 0.25
    latency: float = 1e-4

    def inside(self, eqn: JaxprEqn) -> float:
        """Seconds that the enclave takes to compute a product itself."""
        speed = self.dot_flops if eqn.primitive is dot_general_p else self.convolution_flops
        return work(eqn) / speed

    def crossing(self, variable: Var, scheme: Scheme) -> float:
        """Seconds to blind (or unblind) a value and move it."""
        size = math.prod(variable.aval.shape)
        itemsize = np.dtype(variable.aval.dtype).itemsize
        cost = scheme.nanoseconds_per_element + itemsize * self.nanoseconds_per_byte
        return size * cost * 1e-9
