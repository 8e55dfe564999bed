"""A reference interpreter: runs a plan in this process, eagerly, with the enclave's real blinding.

It shares the planner and the blinding schemes with the real thing, and neither the host program,
the protocol nor the enclave's executor. It is strict where those are lenient: a segment sees the
values it declares and no others, the host sees what was sent to it and what it computed, and
every value on the host has the type that the plan says.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import ArrayType, Crossing, Layout
from enclave_runtime.schemes import Scheme, make_scheme
from tempo_jax.jaxprs import equations, types
from tempo_jax.jaxprs.types import array_type
from tempo_jax.planning.plan import Plan, make_plan
from tempo_jax.planning.request import Request
from tests.support.steps import SIGNED_PERMUTATION


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


def plan(
    function: Callable[..., Any],
    *arguments: Any,
    stateful: bool = False,
    scheme: Scheme = SIGNED_PERMUTATION,
    verify: bool = False,
) -> Flat:
    """Plans a function as `shield(function, scheme=scheme, offload="all")` does.

    Args:
      function: what to plan.
      *arguments: pytrees of arrays.
      stateful: whether the first argument and the first result carry state.
      scheme: the blinding scheme.
      verify: whether products are checked.
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
        scheme=scheme,
        costs=None,
        offload=True,
        workers=1,
        verify=verify,
    )
    return Flat(make_plan(request), out[0], leaves)


def interpret(flat: Flat) -> Any:
    """Runs a plan under freshly drawn keys and returns its result in the clear."""
    return jax.tree.unflatten(flat.structure, _Interpreter(flat.plan).run(flat.leaves))


def blind(
    scheme: Scheme, plain: Any, layout: Layout, keys: Mapping[int, Any], blinded: ArrayType
) -> tuple[np.ndarray, Any]:
    """Blinds a value into an array of the type `blinded`.

    Returns:
      The array, and what unblinding a product of it needs.
    """
    # What a scheme forgot to write does not pass for a value.
    out = np.full(blinded.shape, np.nan, np.dtype(blinded.dtype))
    stream = functools.partial(KeySchedule().stream, "tensor")
    secret = scheme.blind(plain, layout, keys, out, stream)
    return out, secret


class _Interpreter:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.scheme = make_scheme(plan.program.scheme, plan.program.parameters)
        schedule = KeySchedule()
        self.keys = {
            number: self.scheme.draw(key_class, schedule.stream("class", number))
            for number, key_class in enumerate(plan.program.classes)
        }
        self.secrets: dict[int, Any] = {}  # of each value that was sent, by its number
        self.inside: dict[Any, Any] = {}
        self.received: dict[Any, Any] = {}
        self.computed: dict[Any, Any] = {}

    # Crossings

    def blind(self, variable: Any, plain: Any) -> tuple[jax.Array, Any]:
        """A value as the host gets it when it is to lie on the devices."""
        layout, array = self.plan.layout(variable), self.plan.blinded(variable)
        out, secret = blind(self.scheme, plain, layout, self.keys, array)
        return jnp.asarray(out), secret

    def send(self, variable: Any, crossing: Crossing) -> None:
        assert crossing.layout == self.plan.layout(variable)
        plain = self.inside[variable]
        if crossing.layout.keyed:
            blinded, self.secrets[crossing.value] = self.blind(variable, plain)
        else:
            blinded = plain
        assert array_type(blinded) == crossing.blinded
        self.received[variable] = blinded

    def receive(self, variable: Any, crossing: Crossing) -> None:
        assert crossing.layout == self.plan.layout(variable)
        blinded = self.computed[variable]
        assert array_type(blinded) == crossing.blinded
        if not crossing.layout.keyed:
            self.inside[variable] = blinded
            return
        operands = None
        if crossing.operands is not None:
            left, right = crossing.operands
            operands = (self.secrets[left], self.secrets[right])
        plain = self.unblind(blinded, crossing.layout, operands)
        assert array_type(plain) == crossing.array
        self.inside[variable] = plain

    def unblind(self, blinded: Any, layout: Layout, operands: Any = None) -> jax.Array:
        return self.scheme.unblind(np.asarray(blinded), layout, self.keys, operands)

    # The run

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        plan = self.plan
        self.inside.update(zip(plan.jaxpr.constvars, plan.flat.consts, strict=True))
        for index, (variable, x) in enumerate(zip(plan.jaxpr.invars, arguments, strict=True)):
            if index in plan.placement.resident:
                self.computed[variable], _ = self.blind(variable, x)
            else:
                self.inside[variable] = jnp.asarray(x)
        for eqn in plan.cut.constants:
            self.host_equation(eqn, self.computed, self.computed)
        pending = list(plan.cut.host)
        parts = zip(plan.cut.segments, plan.program.segments, strict=True)
        for level, (segment, described) in enumerate(parts):
            pending = self.host_equations(pending, level)
            for v, crossing in zip(segment.uploads, described.uploads, strict=True):
                self.receive(v, crossing)
            seen = {v: self.inside[v] for v in segment.inputs}
            outputs = run_segment(segment, seen)
            self.inside.update(zip(segment.outputs, outputs, strict=True))
            for v, crossing in zip(segment.downloads, described.downloads, strict=True):
                self.send(v, crossing)
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
        results = equations.evaluate([eqn], env, eqn.outvars)
        self.computed.update(zip(eqn.outvars, results, strict=True))

    def output(self, position: int, variable: Any) -> Any:
        if position in self.plan.revealed:
            return self.received[variable]
        places = dict(zip(self.plan.sealed, self.plan.program.outputs, strict=True))
        if places[position].place == "device":
            return self.unblind(self.computed[variable], places[position].layout)
        return self.inside[variable]


def run_segment(segment: Any, seen: dict[Any, Any]) -> list[Any]:
    """Runs a segment as one compiled function: to compile its equations one by one takes longer."""
    variables = list(seen)

    @jax.jit
    def run(*values: Any) -> list[Any]:
        env = dict(zip(variables, values, strict=True))
        return equations.evaluate(segment.eqns, env, segment.outputs)

    return run(*seen.values())


def is_variable(atom: Any) -> bool:
    """Whether an equation's operand is a variable, as opposed to a literal."""
    return isinstance(atom, types.Var)
