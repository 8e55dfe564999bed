"""What a provisioned program has to meet for its scheme's sake, beside the format.

The client's planner sees to it; the enclave takes nobody's word. Trusted.
"""

from __future__ import annotations

from enclave_runtime.protocol.program import DEVICE, Program, ProgramError
from enclave_runtime.schemes.contract import Scheme


def check_program(program: Program, scheme: Scheme) -> None:
    """Checks that crossings lie in the arena as the scheme represents them, and no product wraps.

    Raises:
      ProgramError: one does not, the scheme refuses a product, or it is not told of one.
    """
    types = {}
    for crossing, came in (
        *((c, False) for s in program.segments for c in s.downloads),
        *((c, True) for s in program.segments for c in s.uploads),
    ):
        plain = program.multiplied(crossing)
        types[crossing.value] = plain
        expected = scheme.representation(plain, product=came) if crossing.layout.keyed else plain
        if crossing.blinded != expected:
            raise ProgramError("a crossing has the wrong blinded type")
    if not scheme.describes_products:
        return
    if any(port.place == DEVICE for port in (*program.inputs, *program.outputs)):
        raise ProgramError("a value stays on the devices under a scheme that leaves none there")
    for crossing in (c for s in program.segments for c in s.uploads):
        if crossing.operands is None or crossing.product is None or not crossing.layout.keyed:
            raise ProgramError("an upload is not said to be a product")
        lhs, rhs = (types[v] for v in crossing.operands)
        terms, _ = crossing.product.sizes(lhs.shape, rhs.shape)
        why = scheme.refuses(lhs, rhs, types[crossing.value], terms)
        if why is not None:
            raise ProgramError(why)
