"""What a user should hear without asking: options without effect, and plans that send little out.

Untrusted.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from tempo_jax.errors import PlanWarning
from tempo_jax.jaxprs import equations, primitives
from tempo_jax.planning.plan import Plan, offloaded
from tempo_jax.reporting.figures import Figures
from tempo_jax.reporting.text import percent, would_leave

_log = logging.getLogger("tempo_jax")
_PACKAGE = str(Path(__file__).parent.parent)


def warn_of(figures: Figures, told: set[str]) -> None:
    """Warns of what a plan does not do, through `warnings` alone.

    A log that is shown beside them would say the same twice; `logging.captureWarnings(True)` has
    them in the log instead.

    Args:
      figures: of the plan.
      told: subjects of which the user was told before; more are added.
    """
    for subject, words in _notices(figures):
        if subject not in told:
            told.add(subject)
            warnings.warn(words, PlanWarning, stacklevel=_depth())


def tell_of_signature(figures: Figures, planned: float, exported: float, compiled: float) -> None:
    """Logs a new signature, at level INFO.

    Args:
      figures: of its plan.
      planned: seconds that tracing and planning took.
      exported: seconds that exporting the segments took.
      compiled: seconds that the enclave took to compile them.
    """
    outside, total = figures.products
    _log.info(
        "`%s`: planned in %.2f s (%d of %d products go out), exported in %.2f s, compiled in the "
        "enclave in %.2f s",
        figures.name,
        planned,
        outside,
        total,
        exported,
        compiled,
    )


def _notices(figures: Figures) -> Iterator[tuple[str, str]]:
    plan, name = figures.plan, figures.name
    here, everything = figures.offloaded_work
    if figures.sends_little:
        outside, total = figures.products
        yield (
            "little",
            f"`{name}` sends {outside} of its {total} products to the devices, "
            f"{percent(here, everything)} of their arithmetic, and computes the rest in the "
            f"enclave. {would_leave(figures)} `{name}.explain(...)` says why each stays.",
        )
    silent = equations.debugging(plan.request.closed.jaxpr)
    if silent:
        lines = ", ".join(dict.fromkeys(equations.line(eqn) for eqn in silent))
        yield (
            "debugging",
            f"`jax.debug` in `{name}` ({lines}) prints and calls nothing: its values are secret. "
            "Return what the host may see through `tempo.reveal`.",
        )
    why = _mesh_without_effect(plan)
    if why is not None:
        yield "mesh", f"`mesh=` has no effect on `{name}`: {why}."
    why = _cheap_update_without_effect(plan)
    if why is not None:
        yield "cheap_update", f"`cheap_update` has no effect on `{name}`: {why}."


def _mesh_without_effect(plan: Plan) -> str | None:
    if plan.request.workers == 1:
        return None
    if not offloaded(plan):
        return "nothing leaves the enclave that devices could share out"
    if not plan.sharded and plan.pools == 1:
        return (
            f"no axis of what crosses can be split over {plan.request.workers} devices, each of "
            "which computes the whole"
        )
    return None


def _cheap_update_without_effect(plan: Plan) -> str | None:
    marks = equations.equations(plan.request.closed.jaxpr)
    if not plan.request.offload or plan.placement.resident:
        return None
    if not any(eqn.primitive is primitives.cheap_p for eqn in marks):
        return None
    scheme = plan.request.scheme
    if scheme.key_budget == 0 or scheme.keys_per_product:
        return (
            f"{scheme.name} has new keys for every step, so that weights are updated in the "
            "enclave. Leave it out, or take a scheme that keeps keys and protects less"
        )
    reasons = list(plan.placement.reasons.values())
    return reasons[0] if reasons else "no leaf of the carried state is updated by it"


def _depth() -> int:
    """How far up from `warn_of` the user's own line is, as `warnings.warn` counts."""
    frame, depth = sys._getframe(1), 1
    # A context manager as a decorator of ours brings a frame of the standard library.
    ours = (_PACKAGE, contextlib.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, depth = frame.f_back, depth + 1
    return depth
