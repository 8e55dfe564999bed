"""What `explain` prints: what runs where, under which keys, and what crosses."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from enclave_runtime.protocol.descriptions import (
    ELEMENT_ROUNDING,
    VECTORS,
    block_width,
    checksum_limit,
    checksum_resolution,
    checksum_width,
    resolution,
    unit_roundoff,
)
from enclave_runtime.protocol.program import DEVICE, ArrayType, Crossing, KeyClass
from enclave_runtime.protocol.updates import AxisNumbers, free_axes
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.jaxprs.types import array_type
from tempo_jax.planning.plan import Plan, offloaded, offloaded_work
from tempo_jax.planning.walk import Side
from tempo_jax.schemes import Group


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan, readable.

    Attributes:
      name: the shielded function's name.
      plan: the plan.
      arguments: a name for each flat argument.
    """

    name: str
    plan: Plan
    arguments: Sequence[str]

    @property
    def resident(self) -> dict[str, str]:
        """Device-resident leaves and the key classes of their axes."""
        positions = sorted(self.plan.placement.resident)
        return {self.arguments[i]: self._keys(self.plan.jaxpr.invars[i]) for i in positions}

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
        return max((min(_limit(p.array, axes) for axes in p.projections) for p in ports), default=0)

    @property
    def checksum_bytes(self) -> int:
        """Bytes of the checksums that the enclave keeps between calls."""
        return sum(
            _checksum_bytes(p.array, axes)
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
            (c.source, _noticed(c, types, leaves)) for c in uploads if c.product is not None
        )

    @property
    def _element_tolerance(self) -> float:
        """How much of itself an element may be off, whatever its row; of the coarsest product."""
        sent = self._sent | self._followed
        uploads = (c for s in self.plan.program.segments for c in s.uploads)
        units = (_unit(c, sent) for c in uploads if c.product is not None)
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

    def _keys(self, v: Any) -> str:
        """The type of a value with its axes' keys, as in `float32[128+32:k3, 32, 16:k5]`."""
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

    def _legend(self) -> str:
        """What the marks on axes mean under the scheme."""
        scheme = self.plan.request.scheme
        marks = ["kN names an axis's key class", "an axis without one carries no key"]
        if scheme.group is Group.SIGNED_PERMUTATION:
            marks.append("± that signs apply")
        if not scheme.group.orthogonal:
            marks.append("⁻ᵀ the inverse-transpose key")
        if scheme.keys_per_product:
            marks.append("+N decoy rows, ×N a key for each index of the batch")
        return "; ".join(marks)

    def _product(self, eqn: Any) -> str:
        operands = " × ".join(self._keys(v) for v in eqn.invars)
        return f"{eqn.primitive.name} {operands} → {self._keys(eqn.outvars[0])}"

    @staticmethod
    def _pattern(eqn: Any) -> str:
        """A product without its keys; the layers of a deep model mostly repeat a few."""
        return f"{eqn.primitive.name} " + " × ".join(v.aval.str_short() for v in eqn.invars)

    def __str__(self) -> str:
        """The report as text."""
        plan = self.plan
        lines = [f"{self.name} under {plan.request.scheme.name}"]
        if plan.request.offload:
            lines.append(f"  the host learns {plan.request.scheme.host_learns}")
        lines += [*self._products(), *self._verification(), *self._leaves(), *self._crossings()]
        lines += [f"note: {note}" for note in plan.notes]
        return "\n".join(lines)

    def _products(self) -> list[str]:
        plan = self.plan
        products = offloaded(plan)
        outside, total = self.offloaded_work
        share = f", {outside / total:.0%} of the arithmetic of all products" if total else ""
        lines = [f"on the devices: {len(products)} products{share} ({self._legend()})"]
        lines += _grouped(
            (self._pattern(eqn), f"{self._product(eqn)}, {equations.source(eqn)}")
            for _, eqn in products
        )
        inside = Counter(
            e.primitive.name
            for e, side in zip(plan.jaxpr.eqns, plan.placement.sides, strict=True)
            if side is Side.ENCLAVE
        )
        most = ", ".join(f"{name} {n}" for name, n in inside.most_common(8))
        lines.append(f"in the enclave: {sum(inside.values())} equations ({most})")
        kept = []
        for number, why in sorted(plan.placement.kept_inside.items()):
            eqn = plan.jaxpr.eqns[number]
            kept.append((self._pattern(eqn), f"{self._pattern(eqn)} stays inside: {why}"))
        lines += _grouped(kept)
        return lines

    def _verification(self) -> list[str]:
        if not self.plan.request.verify:
            return ["not verified: a device that returns a wrong product is not noticed"]
        checked = self.checked
        if not checked:
            return ["verified: nothing comes back from the devices that could be wrong"]
        coarsest, least = max(checked, key=lambda each: each[1])
        return [
            f"verified: each of the {len(checked)} products, on blinded values; an element that "
            f"is wrong by more than {least:.1g} of its row's RMS (less for most, this for "
            f"{coarsest}) and by more than {self._element_tolerance:.1g} of itself (both of their "
            f"terms, where those cancel) escapes with a probability of 2^-{VECTORS} at most; "
            f"copies of what was sent take up to {self.bytes_kept / 1e6:.1f} MB inside"
        ]

    def _leaves(self) -> list[str]:
        lines = [f"device-resident leaves, updated where they lie: {len(self.resident)}"]
        lines += [f"  {name}: {keys}" for name, keys in self.resident.items()]
        if self.checksum_runs:
            lines.append(
                f"each is held to a secret checksum that follows its update, {VECTORS} vectors, "
                f"{self.checksum_bytes / 1e6:.1f} MB inside; after {self.checksum_runs} calls at "
                "most it is brought in, checked and blinded anew. An error in an update counts by "
                "the leaf, not by the update"
            )
        if self.encryptions_saved:
            lines.append(
                f"the cheap update saves {self.encryptions_saved} encryptions of weights a call"
            )
        if self.fallbacks:
            lines.append("marked cheap, but updated in the enclave:")
            lines += _grouped((why, f"{name}: {why}") for name, why in self.fallbacks.items())
        return lines

    def _crossings(self) -> list[str]:
        plan = self.plan
        revealed = {plan.jaxpr.outvars[i] for i in plan.revealed}
        scalars = sum(
            not array_type(v.aval).shape and v not in revealed
            for s in plan.cut.segments
            for v in s.downloads
        )
        lines = [
            f"each call: {self.round_trips} round trips, {self.bytes_down / 1e6:.1f} MB down, "
            f"{self.bytes_up / 1e6:.1f} MB up",
            f"in the clear: {len(plan.revealed)} revealed outputs, {scalars} scalars of the "
            "device-side update",
        ]
        if plan.request.workers > 1:
            split = ", ".join(f"k{c}" for c in sorted(plan.sharded)) or "none"
            lines.append(f"{plan.request.workers} workers; classes split over them: {split}")
        return lines


def _noticed(
    crossing: Crossing, sent: Mapping[int, ArrayType], leaves: Mapping[int, ArrayType]
) -> float:
    """The smallest error that the check of a product notices, over the RMS of its row."""
    assert crossing.product is not None and crossing.operands is not None
    lhs, rhs = (sent[v] for v in crossing.operands)
    unit = _unit(crossing, sent)
    for which, value in enumerate(crossing.operands):
        if value in leaves:
            _, axes = free_axes(crossing.product, (len(lhs.shape), len(rhs.shape)), which)
            return checksum_resolution(*_checksum_sizes(leaves[value], axes), unit)
    terms, columns = crossing.product.sizes(lhs.shape, rhs.shape)
    return resolution(terms, block_width(terms, columns, unit), unit)


def _checksum_sizes(array: ArrayType, axes: AxisNumbers) -> tuple[int, int]:
    """Rows of a leaf's projection, and how many columns are combined."""
    columns = math.prod(array.shape[a] for a in axes)
    terms = array.size // columns
    return terms, checksum_width(terms, columns, unit_roundoff(array.dtype))


def _limit(array: ArrayType, axes: AxisNumbers) -> int:
    return checksum_limit(*_checksum_sizes(array, axes), unit_roundoff(array.dtype))


def _checksum_bytes(array: ArrayType, axes: AxisNumbers) -> int:
    """Float64 values and bounds of each row and block."""
    terms, width = _checksum_sizes(array, axes)
    return 8 * terms * -(-(array.size // terms) // width) * (VECTORS + 1)


def _unit(crossing: Crossing, sent: Mapping[int, ArrayType]) -> float:
    """Unit roundoff of a product's least exact format."""
    assert crossing.operands is not None
    types = (*(sent[v] for v in crossing.operands), crossing.blinded)
    return unit_roundoff(*(t.dtype for t in types))


def _grouped(lines: Iterable[tuple[str, str]]) -> list[str]:
    """The first line of each group, and how many more are like it."""
    groups: dict[str, list[str]] = {}
    for group, line in lines:
        groups.setdefault(group, []).append(line)
    return [
        f"  {first}" + (f" (and {len(more)} more like it)" if more else "")
        for first, *more in groups.values()
    ]
