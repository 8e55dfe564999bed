"""What a product costs the enclave inside, and what sending it out costs.

The device counts as free, so that a laptop without an accelerator makes the same plan as a machine
with one. Untrusted and pure. The constants are measured once per machine by `planning.calibration`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from enclave_runtime.protocol.descriptions import VECTORS, block_width, unit_roundoff
from tempo_jax.jaxprs.equations import repeated, subjaxprs
from tempo_jax.jaxprs.primitives import dot_general_p
from tempo_jax.jaxprs.products import description, is_product, work
from tempo_jax.jaxprs.types import JaxprEqn, array_type, nbytes
from tempo_jax.schemes import Scheme, SchemeCost

_REQUEST = 3  # what one more request takes, in latencies of one more product
_AHEAD = 10  # what a value takes to be blinded, likewise, if that is to be done in one more


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Speeds of the enclave's side; the defaults are those of two cores of a current server.

    Attributes:
      dot_flops: of matrix products, per second.
      convolution_flops: of convolutions, per second.
      nanoseconds_per_byte: of moving a tensor through shared memory into the host program.
      latency: seconds that one more product adds to a round trip.
      schemes: what each scheme costs, by its name; its own reference counts where it is missing.
      checking: nanoseconds for each element of operands and result to check a product, beside
        the arithmetic; 0 where products are not checked.
      margin: a product goes out only where the enclave saves by this factor: what is measured once,
        in warm caches, may take up to half as long again in the middle of a step.
      measured_at: seconds since 1970 at which it was measured; 0 if that is not known.
      stale: whether runs took so much more or less that it is to be measured anew.
      confirmed: whether it was measured anew for that reason, and came out alike.
    """

    dot_flops: float = 1e11
    convolution_flops: float = 6e10
    nanoseconds_per_byte: float = 0.25
    latency: float = 1e-4
    schemes: Mapping[str, SchemeCost] = dataclasses.field(default_factory=dict)
    checking: float = 0.0
    margin: float = 1.5
    measured_at: int = dataclasses.field(default=0, compare=False)
    stale: bool = dataclasses.field(default=False, compare=False)
    confirmed: bool = dataclasses.field(default=False, compare=False)

    def inside(self, eqn: JaxprEqn) -> float:
        """Seconds that the enclave takes to compute a product itself."""
        speed = self.dot_flops if eqn.primitive is dot_general_p else self.convolution_flops
        return work(eqn) / speed

    def tensor(self, count: int, itemsize: float, scheme: Scheme) -> float:
        """Seconds to blind (or unblind) a tensor of so many elements and move it.

        Args:
          count: elements.
          itemsize: bytes that cross for each.
          scheme: the scheme.
        """
        cost = self.cost_of(scheme)
        each = cost.blinding + itemsize * self.nanoseconds_per_byte
        return cost.overhead + count * each * 1e-9

    def cost_of(self, scheme: Scheme) -> SchemeCost:
        """What a scheme costs on this machine."""
        return self.schemes.get(scheme.name, scheme.reference)

    def crossing(self, aval: Any, scheme: Scheme, *, product: bool = False) -> float:
        """Seconds to blind a value, or to unblind it as a product, and move it."""
        array = array_type(aval)
        held = scheme.representation(array, product=product)
        return self.tensor(array.size, held.nbytes / max(array.size, 1), scheme)

    def deserves_request(self, aval: Any, scheme: Scheme) -> bool:
        """Whether taking in a product is work enough for a request of its own."""
        return self.crossing(aval, scheme, product=True) > _REQUEST * self.latency

    def may_go_ahead(self, aval: Any, scheme: Scheme) -> bool:
        """Whether blinding a value is work enough to be done while devices compute.

        What is won is as much at most, and nothing where they are fast; a request is lost.
        """
        return self.crossing(aval, scheme) > _AHEAD * self.latency

    def check_of(self, eqn: JaxprEqn) -> float:
        """Seconds to check an equation's result."""
        lhs, rhs = (v.aval.shape for v in eqn.invars)
        result = math.prod(eqn.outvars[0].aval.shape)
        terms, columns = description(eqn).sizes(lhs, rhs)
        return self.check(terms, columns, math.prod(lhs) + math.prod(rhs) + result, result)

    def keys(self, entries: int, scheme: Scheme) -> float:
        """Seconds to draw keys, over so many entries of axes."""
        return entries * self.cost_of(scheme).drawing * 1e-9

    def rearranging(self, count: int, itemsize: int) -> float:
        """Seconds to copy so many elements into another order, read and written once."""
        return 2 * count * itemsize * self.nanoseconds_per_byte * 1e-9

    def check(self, terms: int, columns: int, elements: int, result: int) -> float:
        """Seconds to check a product, see `enclave_runtime.verifying.integrity`.

        Args:
          terms: of each element's sum.
          columns: of the result.
          elements: of operands and result.
          result: elements of the result.
        """
        if not self.checking:
            return 0.0
        blocks = -(-columns // block_width(terms, columns, unit_roundoff("float32")))
        work = 2 * terms * result / max(columns, 1) * blocks * (VECTORS + 1)
        # A product with so few columns is far from the speed of a wide one.
        return 2 * work / self.dot_flops + elements * self.checking * 1e-9

    def branches_too_dear(self, cond: JaxprEqn, scheme: Scheme) -> str | None:
        """Why the branches of a `cond` should not all be computed, their products outside.

        A branch inside counts as the mean of all: which is taken is not known.
        """
        inside, outside = [], 0.0
        for body in subjaxprs(cond):
            seconds = 0.0
            for eqn, times in repeated(body):
                if is_product(eqn):
                    alone = self.inside(eqn)
                    sent = self.latency + self.check_of(eqn)
                    sent += sum(self.crossing(v.aval, scheme) for v in eqn.invars)
                    sent += self.crossing(eqn.outvars[0].aval, scheme, product=True)
                    outside += times * (sent if self.worthwhile(alone, sent) else alone)
                else:
                    moved = sum(nbytes(v) for v in eqn.outvars)
                    alone = moved * self.nanoseconds_per_byte * 1e-9
                    outside += times * alone
                seconds += times * alone
            inside.append(seconds)
        mean = sum(inside) / len(inside)
        if self.worthwhile(mean, outside):
            return None
        return (
            f"one of its branches takes about {mean * 1e3:.2g} ms inside, what is left there of "
            f"all of them {outside * 1e3:.2g} ms"
        )

    def worthwhile(self, inside: float, outside: float) -> bool:
        """Whether sending a product out saves the enclave enough."""
        return inside > self.margin * outside

    def too_cheap(self, inside: float, outside: float) -> str:
        """Why a product stays inside, from the seconds that either way takes."""
        return (
            f"computing it inside takes about {inside * 1e3:.2g} ms, blinding and moving its "
            f"operands {outside * 1e3:.2g} ms, and it goes out from {self.margin:g} times less on"
        )
