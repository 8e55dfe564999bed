"""A reference interpreter: runs a plan in this process, eagerly, with the enclave's real blinding.

It shares the planner and the blinding schemes with the real thing, and neither the host program,
the protocol nor the enclave's executor. It is strict where those are lenient: a segment sees the
values it declares and no others, the host sees what was sent to it and what it computed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.keys import KeySchedule
from enclave_runtime.schemes import SCHEMES
from tempo_jax import _jaxpr
from tempo_jax._plan import Plan, Request, make_plan
from tempo_jax.schemes import SignedPermutation


@dataclasses.dataclass(frozen=True)
class Flat:
    """A function of flat arrays, with what is needed to get its tree back.

    Attributes:
      plan: its plan, with every product offloaded that can be.
      structure: of its result.
      leaves: its flat arguments.
    """

    plan: Plan
    structure: Any
    leaves: Sequence[Any]


def plan(function: Callable[..., Any], *arguments: Any, stateful: bool = False) -> Flat:
    """Plans a function as `shield(function, offload="all")` does.

    Args:
      function: what to plan.
      *arguments: pytrees of arrays.
      stateful: whether the first argument and the first result carry state.
    """
    leaves, structure = jax.tree.flatten(arguments)
    out: list[Any] = []

    def flat_function(*flat: Any) -> list[Any]:
        values, result_structure = jax.tree.flatten(function(*jax.tree.unflatten(structure, flat)))
        out.append(result_structure)
        return [jnp.asarray(x) for x in values]

    closed: Any = jax.make_jaxpr(flat_function)(*leaves)
    request = Request(
        closed=closed,
        carried={i: i for i in range(len(jax.tree.leaves(arguments[0])))} if stateful else {},
        public=frozenset(),
        on_devices=frozenset(),
        scheme=SignedPermutation(),
        costs=None,
        offload=True,
        workers=1,
    )
    return Flat(make_plan(request), out[0], leaves)


def interpret(flat: Flat) -> Any:
    """Runs a plan under freshly drawn keys and returns its result in the clear."""
    return jax.tree.unflatten(flat.structure, _Interpreter(flat.plan).run(flat.leaves))


class _Interpreter:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.scheme = SCHEMES[plan.program.scheme]
        schedule = KeySchedule()
        self.keys = {
            number: self.scheme.draw(key_class, schedule.stream("class", number))
            for number, key_class in enumerate(plan.program.classes)
        }
        self.inside: dict[Any, Any] = {}
        self.received: dict[Any, Any] = {}
        self.computed: dict[Any, Any] = {}

    def blind(self, variable: Any, plain: Any) -> jax.Array:
        layout = self.plan.layouts.get(variable)
        return plain if layout is None else self.scheme.blind(plain, layout, self.keys)

    def unblind(self, variable: Any, blinded: Any) -> jax.Array:
        layout = self.plan.layouts[variable]
        return self.scheme.unblind(np.asarray(blinded), layout, self.keys)

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        plan = self.plan
        self.inside.update(zip(plan.jaxpr.constvars, plan.flat.consts, strict=True))
        for index, (variable, x) in enumerate(zip(plan.jaxpr.invars, arguments, strict=True)):
            if index in plan.placement.resident:
                self.computed[variable] = self.blind(variable, x)
            else:
                self.inside[variable] = jnp.asarray(x)
        for eqn in plan.cut.constants:
            self.host_equation(eqn, self.computed, self.computed)
        pending = list(plan.cut.host)
        for level, segment in enumerate(plan.cut.segments):
            pending = self.host_equations(pending, level)
            for v in segment.uploads:
                self.inside[v] = self.unblind(v, self.computed[v])
            seen = {v: self.inside[v] for v in segment.inputs}
            outputs = _jaxpr.evaluate(segment.eqns, seen, segment.outputs)
            self.inside.update(zip(segment.outputs, outputs, strict=True))
            for v in segment.downloads:
                self.received[v] = self.blind(v, self.inside[v])
        assert not self.host_equations(pending, len(plan.cut.segments))
        return [self.output(i, v) for i, v in enumerate(plan.jaxpr.outvars)]

    def host_equations(self, pending: Sequence[Any], level: int) -> list[Any]:
        """Evaluates the host's equations of this level; returns those of later ones."""
        later = []
        for equation in pending:
            if self.plan.cut.levels[equation.eqn.outvars[0]] > level:
                later.append(equation)
            elif equation.sent:
                self.host_equation(equation.eqn, self.received, self.computed)
            else:
                self.host_equation(equation.eqn, self.computed, self.received)
        return later

    def host_equation(self, eqn: Any, first: dict[Any, Any], second: dict[Any, Any]) -> None:
        env = {v: first[v] if v in first else second[v] for v in eqn.invars if is_variable(v)}
        results = _jaxpr.evaluate([eqn], env, eqn.outvars)
        self.computed.update(zip(eqn.outvars, results, strict=True))

    def output(self, position: int, variable: Any) -> Any:
        if position in self.plan.revealed:
            return self.received[variable]
        places = dict(zip(self.plan.sealed, self.plan.program.outputs, strict=True))
        if places[position].place == "device":
            return self.unblind(variable, self.computed[variable])
        return self.inside[variable]


def is_variable(atom: Any) -> bool:
    """Whether an equation's operand is a variable, as opposed to a literal."""
    return isinstance(atom, _jaxpr.Var)
