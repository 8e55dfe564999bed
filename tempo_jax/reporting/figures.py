"""The figures of a plan: what crosses, what is checked and kept, and under which keys.

Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import primitives as prims

from enclave_runtime.protocol.descriptions import ELEMENT_ROUNDING
from enclave_runtime.protocol.program import DEVICE, ArrayType, KeyClass
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import Plan, offloaded, offloaded_work
from tempo_jax.planning.prospects import Prospects, prospects
from tempo_jax.reporting.costs import Costs, costs_of
from tempo_jax.reporting.detection import (
    checksum_bytes,
    roundoff,
    runs_until_renewed,
    smallest_error,
)
from tempo_jax.schemes import Group

LITTLE = 0.1  # share of the arithmetic outside below which a user should know why


@dataclasses.dataclass(frozen=True)
class Figures:
    """A plan in figures.

    Attributes:
      name: the shielded function's name.
      plan: the plan.
      arguments: a name for each flat argument.
      model: the enclave's speeds, for what is estimated.
    """

    name: str
    plan: Plan
    arguments: Sequence[str]
    model: CostModel

    @functools.cached_property
    def costs(self) -> Costs:
        """What a call costs the enclave by layer, by visit and in all; estimated."""
        return costs_of(self.plan, self.model, self.arguments)

    @property
    def busy_seconds(self) -> float | None:
        """Seconds of a call that the enclave should be busy, or None if it has a `while`."""
        every = equations.equations(self.plan.jaxpr)
        if any(eqn.primitive is prims.while_p for eqn in every):
            return None
        return self.costs.inside_seconds + self.costs.blinding_seconds

    @functools.cached_property
    def prospects(self) -> Prospects:
        """From which size on most of the arithmetic would leave the enclave."""
        return prospects(self.plan, self.model)

    @property
    def sends_little(self) -> bool:
        """Whether less than a tenth of the arithmetic leaves though it might."""
        outside, total = self.offloaded_work
        return self.plan.request.offload and outside < LITTLE * total

    @property
    def products(self) -> tuple[int, int]:
        """How many products are sent out, and how many there are."""
        layers = self.costs.layers
        return sum(x.outside for x in layers), sum(x.products for x in layers)

    @property
    def resident(self) -> dict[str, str]:
        """Device-resident leaves and the key classes of their axes."""
        positions = sorted(self.plan.placement.resident)
        return {self.arguments[i]: self.keys(self.plan.jaxpr.invars[i]) for i in positions}

    @property
    def split_leaves(self) -> dict[str, int | None]:
        """With `shard_weights`, the axis of which each worker keeps a part; None where it is whole.

        Of each device-resident leaf.
        """
        if not self.plan.request.shard_weights:
            return {}
        positions = sorted(self.plan.placement.resident)
        return {
            self.arguments[i]: self.plan.parts.get(self.plan.jaxpr.invars[i]) for i in positions
        }

    @property
    def resident_bytes(self) -> tuple[int, int]:
        """Bytes of the device-resident leaves that each worker keeps, and of all of them."""
        plan, kept, whole = self.plan, 0, 0
        for v in (plan.jaxpr.invars[i] for i in plan.placement.resident):
            size = plan.blinded(v).nbytes
            kept += size // plan.request.workers if v in plan.parts else size
            whole += size
        return kept, whole

    @property
    def fallbacks(self) -> dict[str, str]:
        """Leaves whose update is marked cheap but runs in the enclave, with the reason."""
        return {self.arguments[i]: why for i, why in sorted(self.plan.placement.reasons.items())}

    @property
    def round_trips(self) -> int:
        """Visits to the enclave in one call."""
        return len(self.plan.program.segments)

    @property
    def bytes_up(self) -> int:
        """Tensor bytes from the host to the enclave in one call."""
        return sum(c.blinded.nbytes for s in self.plan.program.segments for c in s.uploads)

    @property
    def bytes_down(self) -> int:
        """Tensor bytes from the enclave to the host in one call."""
        return sum(c.blinded.nbytes for s in self.plan.program.segments for c in s.downloads)

    @property
    def offloaded_work(self) -> tuple[int, int]:
        """Floating-point operations of the products sent out, and of all products."""
        return offloaded_work(self.plan)

    @property
    def _sent(self) -> dict[int, ArrayType]:
        """What the enclave sends, by the value's number, as the host has it."""
        sent = (c for s in self.plan.program.segments for c in s.downloads)
        return {c.value: c.blinded for c in sent}

    @property
    def _followed(self) -> dict[int, ArrayType]:
        """What a checksum follows on the devices, by the value's number."""
        program = self.plan.program
        leaves = {p.value: p.array for p in program.inputs if p.place == DEVICE}
        return leaves | {u.value: ArrayType(u.shape, u.dtype) for u in program.updates}

    @property
    def checksum_runs(self) -> int:
        """Calls after which every leaf was brought in, checked and blinded anew; 0 without any."""
        ports = [p for p in self.plan.program.inputs if p.projections]
        return max(
            (min(runs_until_renewed(p.array, axes) for axes in p.projections) for p in ports),
            default=0,
        )

    @property
    def checksum_bytes(self) -> int:
        """Bytes of the checksums that the enclave keeps between calls."""
        return sum(
            checksum_bytes(p.array, axes)
            for p in self.plan.program.inputs
            for axes in p.projections
        )

    @property
    def checked(self) -> tuple[tuple[str, float], ...]:
        """Products that are checked, each with the smallest error that is noticed.

        An error counts by the RMS of the blinded result's row that it is in, if that is not
        what little is left of terms that cancel. A result in which some element is off by more,
        and by more than 2e-4 of itself (in float32), escapes with a probability of `2**-16` at
        most. Within 1.2e-4 of the norm of themselves and their terms elements may always err, so
        one that dominates its row may be off by more of the row's RMS than this figure. For a
        product with a leaf on the devices it is the figure just before the leaf is blinded anew.
        """
        types, leaves = self._sent | self._followed, self._followed
        uploads = (c for s in self.plan.program.segments for c in s.uploads)
        return tuple(
            (c.source, smallest_error(c, types, leaves)) for c in uploads if c.product is not None
        )

    @property
    def element_tolerance(self) -> float:
        """How much of itself an element may be off, whatever its row; of the coarsest product."""
        sent = self._sent | self._followed
        uploads = (c for s in self.plan.program.segments for c in s.uploads)
        units = (roundoff(c, sent) for c in uploads if c.product is not None)
        return ELEMENT_ROUNDING * max(units) * math.sqrt(2)

    @property
    def bytes_kept(self) -> int:
        """The most bytes of copies that the enclave keeps at once of what it sent, to check."""
        segments = self.plan.program.segments
        last: dict[int, int] = {}
        sent_in = {c.value: n for n, s in enumerate(segments) for c in s.downloads}
        for update in self.plan.program.updates:
            if update.product is not None:
                # Until the segment after the one that sends the second operand.
                ready = 1 + max(sent_in[v] for v in update.operands)
                last.update({v: max(ready, last.get(v, 0)) for v in update.operands})
        for index, segment in enumerate(segments):
            for crossing in segment.uploads:
                if crossing.product is not None:
                    operands = crossing.operands or ()
                    last.update({v: max(index, last.get(v, 0)) for v in operands})
        kept: dict[int, int] = {}
        most = 0
        for index, segment in enumerate(segments):
            kept = {v: n for v, n in kept.items() if last[v] >= index}
            kept |= {c.value: c.blinded.nbytes for c in segment.downloads if c.value in last}
            most = max(most, sum(kept.values()))
        return most

    @property
    def encryptions_saved(self) -> int:
        """Weights that would be blinded anew in every call if the enclave updated them."""
        plan = self.plan
        weights = {plan.jaxpr.invars[i]: i for i in plan.placement.resident}
        for equation in plan.cut.host:
            source = equation.eqn.invars[0]
            unary = len(equation.eqn.invars) == 1 and isinstance(source, jaxpr_types.Var)
            if unary and source in weights:
                weights[equation.eqn.outvars[0]] = weights[source]  # in another layout
        operands = [v for _, eqn in offloaded(plan) for v in eqn.invars]
        return len(
            {weights[v] for v in operands if isinstance(v, jaxpr_types.Var) and v in weights}
        )

    def keys(self, v: Any) -> str:
        """The type of a value with its axes' keys, as in `float32[128+32:k3, 32, 16:k5]`."""
        if self.plan.request.scheme.group is Group.ADDITIVE:
            return v.aval.str_short()
        layout, classes = self.plan.layouts[v], self.plan.program.classes
        axes = []
        for n, c, w in zip(v.aval.shape, layout.classes, layout.parities, strict=True):
            if c is None:
                axes.append(str(n))
                continue
            decoys = f"+{classes[c].decoys}" if classes[c].decoys else ""
            copies = f"×{classes[c].copies}" if classes[c].copies > 1 else ""
            axes.append(f"{n}{decoys}:k{c}{copies}{self._power(w, classes[c])}")
        return f"{v.aval.dtype}[{', '.join(axes)}]"

    def _power(self, parity: int, key_class: KeyClass) -> str:
        group = self.plan.request.scheme.group
        if key_class.batch or group is Group.ORTHOGONAL:
            return ""
        if group is Group.SIGNED_PERMUTATION:
            return "±" if parity else ""
        return "" if parity else "⁻ᵀ"
