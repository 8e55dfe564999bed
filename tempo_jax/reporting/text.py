"""A plan as text: one sentence, what a call costs, a row for each layer, the details, the legend.

Untrusted and pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from enclave_runtime.protocol.descriptions import VECTORS
from tempo_jax.jaxprs import equations
from tempo_jax.jaxprs.types import array_type
from tempo_jax.planning.calibration import described
from tempo_jax.planning.plan import offloaded
from tempo_jax.reporting.costs import Layer, counted
from tempo_jax.reporting.figures import Figures
from tempo_jax.schemes import Group

_MOST = 60  # characters of a layer's name in the table; its end says more than its beginning

COLUMNS = ("layer", "sent out", "arithmetic", "MB down", "MB up", "inside", "blinding")


def as_text(figures: Figures) -> str:
    """The whole report."""
    request = figures.plan.request
    lines = [sentence(figures), *totals(figures), ""]
    lines += [*_table(figures), ""]
    lines.append(f"{figures.name} under {request.scheme.name}")
    if request.offload:
        lines.append(f"  the host learns {request.scheme.host_learns}")
        if request.scheme.rounding:
            lines.append(f"  {request.scheme.rounding}")
    lines += [
        *_products(figures),
        *_verification(figures),
        *_leaves(figures),
        *_crossings(figures),
    ]
    lines += [f"note: {note}" for note in figures.plan.notes]
    return "\n".join([*lines, "", legend(figures)])


def sentence(figures: Figures) -> str:
    """What the plan does, plainly."""
    (outside, total), request = figures.products, figures.plan.request
    here, everything = figures.offloaded_work
    if not total:
        return f"`{figures.name}` has no matrix product or convolution, and runs in the enclave."
    if outside:
        return (
            f"`{figures.name}` sends {outside} of its {total} products, "
            f"{percent(here, everything)} of their arithmetic, to the devices "
            f"blinded by {request.scheme.name}, and computes everything else in the enclave."
        )
    if not request.offload:
        why = 'as placement="enclave" asks'
    else:
        why = "and the lines below say why each stays"
    return (
        f"`{figures.name}` sends none of its {total} products out: it runs in the enclave, {why}."
    )


def totals(figures: Figures) -> list[str]:
    """What a call costs, a line each."""
    costs = figures.costs
    lines = [
        f"a call takes the enclave about {duration(costs.inside_seconds + costs.blinding_seconds)}"
        f": {duration(costs.inside_seconds)} inside and {duration(costs.blinding_seconds)} "
        "blinding and moving",
        f"{figures.bytes_down / 1e6:.1f} MB go down to the devices and {figures.bytes_up / 1e6:.1f}"
        f" MB come back, in {figures.round_trips} round trips",
    ]
    if figures.products[0]:
        lines.append(
            f"all inside it would take about {duration(costs.all_inside_seconds)}: the largest "
            f"possible gain is {costs.largest_gain:.2g} times, with devices that take no time"
        )
    if figures.sends_little:
        lines.append(would_leave(figures))
    lines.append(f"estimated from {described(figures.model)}")
    return [f"  {line}" for line in lines]


def would_leave(figures: Figures) -> str:
    """What would have to change for most of the arithmetic to leave, as a sentence."""
    found, ways = figures.prospects, []
    if found.rows is not None:
        ways.append((f"from {found.rows.size:,} rows on (now {found.rows.now:,})", found.rows))
    if found.width is not None:
        ways.append((f"from width {found.width.size:,} on (now {found.width.now:,})", found.width))
    if found.both is not None:
        rows, width = found.both
        words = f"with {rows.size:,} rows (now {rows.now:,}) and width {width.size:,} "
        ways.append((f"{words}(now {width.now:,}) together", rows))
    if not ways:
        return "Neither more rows nor wider layers, nor both together, would change that."
    share = percent(min(way.share for _, way in ways), 1)
    words = ", or ".join(words for words, _ in ways)
    return f"{words[0].upper()}{words[1:]}, {share} of it would leave on this machine."


def duration(seconds: float) -> str:
    """Seconds in the unit that fits, to two digits."""
    if seconds < 5e-5:
        return "0 ms"
    if seconds >= 0.0995:
        return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"
    return f"{seconds * 1e3:.2g} ms"


def percent(part: float, whole: float) -> str:
    """A share, never rounded to nothing or to all."""
    if 0 < part < whole and round(part / whole, 2) in (0, 1):
        return "<1%" if part < whole / 2 else ">99%"
    return f"{part / whole:.0%}"


def cells(layer: Layer, total: int) -> tuple[str, ...]:
    """A layer as a row of `COLUMNS`; `total` is the arithmetic of all products."""
    return (
        layer.name,
        f"{layer.outside} of {layer.products}" if layer.products else "",
        f"{layer.work / total:.1%}" if layer.products and total else "",
        f"{layer.bytes_down / 1e6:.1f}",
        f"{layer.bytes_up / 1e6:.1f}",
        duration(layer.inside_seconds),
        duration(layer.blinding_seconds),
    )


def _table(figures: Figures) -> list[str]:
    total = figures.offloaded_work[1]
    rows = [COLUMNS, *(cells(layer, total) for layer in figures.costs.layers)]
    return columns(
        [(f"…{name[1 - _MOST :]}" if len(name) > _MOST else name, *rest) for name, *rest in rows]
    )


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines, the first cell to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *rest in rows:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]).rstrip())
    return lines


def legend(figures: Figures) -> str:
    """What the columns mean, and the marks on axes under the scheme."""
    scheme = figures.plan.request.scheme
    marks = ["kN names an axis's key class", "an axis without one carries no key"]
    if scheme.group is Group.ADDITIVE:
        marks = ["every element is hidden, and no axis needs a key"]
    if scheme.group is Group.SIGNED_PERMUTATION:
        marks.append("± that signs apply")
    if not scheme.group.orthogonal:
        marks.append("⁻ᵀ the inverse-transpose key")
    if scheme.keys_per_product:
        marks.append("+N decoy rows, ×N a key for each index of the batch")
    return (
        "legend: seconds are the enclave's, estimated from shapes and its measured speeds; "
        "arithmetic is a layer's share of that of all products, forward and backward; in types, "
        + "; ".join(marks)
    )


def _pattern(eqn: Any) -> str:
    """A product without its keys; the layers of a deep model mostly repeat a few."""
    return f"{eqn.primitive.name} " + " × ".join(v.aval.str_short() for v in eqn.invars)


def _products(figures: Figures) -> list[str]:
    plan = figures.plan
    products = offloaded(plan)
    outside, total = figures.offloaded_work
    share = f", {percent(outside, total)} of the arithmetic of all products" if total else ""
    lines = [f"on the devices: {len(products)} products{share}"]
    typed = []
    for _, eqn in products:
        operands = " × ".join(figures.keys(v) for v in eqn.invars)
        result = figures.keys(eqn.outvars[0])
        line = f"{eqn.primitive.name} {operands} → {result}, {equations.source(eqn)}"
        typed.append((_pattern(eqn), line))
    lines += _grouped(typed)
    inside = Counter(e.primitive.name for e in counted(plan.jaxpr, plan.placement.sides))
    most = ", ".join(f"{name} {n}" for name, n in inside.most_common(8))
    lines.append(f"in the enclave: {sum(inside.values())} equations ({most})")
    kept = []
    for number, why in sorted(plan.placement.kept_inside.items()):
        eqn = plan.jaxpr.eqns[number]
        kept.append((_pattern(eqn), f"{_pattern(eqn)} stays inside: {why}"))
    return lines + _grouped(kept)


def _verification(figures: Figures) -> list[str]:
    if not figures.plan.request.verify:
        return ["not verified: a device that returns a wrong product is not noticed"]
    scheme = figures.plan.request.scheme
    if scheme.exact:
        # Three vectors modulo each prime, see `enclave_runtime.verifying.ring`.
        return [
            f"verified: each of the {len(offloaded(figures.plan))} products, exactly; a wrong one "
            "escapes with a probability of 2^-22 at most"
        ]
    checked = figures.checked
    if not checked:
        return ["verified: nothing comes back from the devices that could be wrong"]
    coarsest, least = max(checked, key=lambda each: each[1])
    return [
        f"verified: each of the {len(checked)} products, on blinded values; an element that "
        f"is wrong by more than {least:.1g} of its row's RMS (less for most, this for "
        f"{coarsest}) and by more than {figures.element_tolerance:.1g} of itself (both of their "
        f"terms, where those cancel) escapes with a probability of 2^-{VECTORS} at most; "
        f"copies of what was sent take up to {figures.bytes_kept / 1e6:.1f} MB inside"
    ]


def _leaves(figures: Figures) -> list[str]:
    lines = [f"device-resident leaves, updated where they lie: {len(figures.resident)}"]
    lines += [f"  {name}: {keys}" for name, keys in figures.resident.items()]
    if figures.checksum_runs:
        lines.append(
            f"each is held to a secret checksum that follows its update, {VECTORS} vectors, "
            f"{figures.checksum_bytes / 1e6:.1f} MB inside; after {figures.checksum_runs} calls at "
            "most it is brought in, checked and blinded anew. An error in an update counts by "
            "the leaf, not by the update"
        )
    if figures.encryptions_saved:
        lines.append(
            f"the cheap update saves {figures.encryptions_saved} encryptions of weights a call"
        )
    if figures.fallbacks:
        lines.append("marked cheap, but updated in the enclave:")
        lines += _grouped((why, f"{name}: {why}") for name, why in figures.fallbacks.items())
    return lines


def _crossings(figures: Figures) -> list[str]:
    plan = figures.plan
    revealed = {plan.jaxpr.outvars[i] for i in plan.revealed}
    scalars = sum(
        not array_type(v.aval).shape and v not in revealed
        for s in plan.cut.segments
        for v in s.downloads
    )
    lines = [
        f"each call: {figures.round_trips} round trips, {figures.bytes_down / 1e6:.1f} MB down, "
        f"{figures.bytes_up / 1e6:.1f} MB up",
        f"in the clear: {len(plan.revealed)} revealed outputs, {scalars} scalars of the "
        "device-side update",
    ]
    pools = plan.request.scheme.device_pools
    if pools > 1 and plan.pools == 1:
        lines.append(f"one device has the shares of all {pools} pools: nothing is hidden from it")
    elif pools > 1:
        lines.append(
            f"{pools} pools of one device each, and one process that drives them sees all shares: "
            "the devices alone are kept apart"
        )
    elif plan.request.workers > 1:
        split = ", ".join(f"k{c}" for c in sorted(plan.sharded)) or "none"
        lines.append(f"{plan.request.workers} workers; classes split over them: {split}")
        lines += _split_leaves(figures)
    return lines


def _split_leaves(figures: Figures) -> list[str]:
    """What `shard_weights` splits, and what it cannot."""
    leaves, workers = figures.split_leaves, figures.plan.request.workers
    if not leaves:
        return []
    kept, whole = figures.resident_bytes
    split = sum(axis is not None for axis in leaves.values())
    text = (
        f"weights and optimizer state on the devices: {split} of {len(leaves)} leaves split, "
        f"{kept / 1e6:.2g} of {whole / 1e6:.2g} MB on each"
    )
    rest = [name for name, axis in leaves.items() if axis is None]
    if rest:
        named = f"{rest[0]} (and {len(rest) - 1} more)" if len(rest) > 1 else rest[0]
        text += f"; whole on each, as {workers} divides no axis: {named}"
    return [text]


def _grouped(lines: Iterable[tuple[str, str]]) -> list[str]:
    """The first line of each group, and how many more are like it."""
    groups: dict[str, list[str]] = {}
    for group, line in lines:
        groups.setdefault(group, []).append(line)
    return [
        f"  {first}" + (f" (and {len(more)} more like it)" if more else "")
        for first, *more in groups.values()
    ]
