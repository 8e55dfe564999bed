"""All reliance on JAX's internals: tracing, inlining, and evaluating single equations.

Untrusted and pure. Serves JAX 0.10 to 0.12. Everything else in the package sees jaxprs
through this module and compares primitives as objects.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config as jax_config  # JAX 0.10-0.12: flags for one thread.
from jax._src import source_info_util  # JAX 0.10-0.12: no public way to keep an equation's source.
from jax._src.state.discharge import discharge_state  # JAX 0.10-0.12: `jit` does the same.
from jax.core import Tracer
from jax.experimental import io_callback
from jax.extend import core as jex_core
from jax.extend.core import primitives as prims
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    # JAX declares `aval` as an abstract class without shape and dtype.
    class Var:
        """A variable of a jaxpr."""

        aval: Any

    class Literal:
        """A constant operand."""

        aval: Any
        val: Any

    class JaxprEqn:
        """An equation."""

        primitive: Any
        params: dict[str, Any]
        invars: list[Any]
        outvars: list[Any]
        source_info: Any
        ctx: Any
        effects: Any

        def replace(self, **changes: Any) -> JaxprEqn:
            """A changed copy."""
            ...

    class Jaxpr:
        """A program without the values of its constants."""

        constvars: list[Var]
        invars: list[Var]
        outvars: list[Any]
        eqns: list[JaxprEqn]

        def replace(self, **changes: Any) -> Jaxpr:
            """A changed copy."""
            ...

    class ClosedJaxpr:
        """A program with the values of its constants."""

        jaxpr: Jaxpr
        consts: Sequence[Any]

        def __init__(self, jaxpr: Jaxpr, consts: Sequence[Any]): ...
else:
    ClosedJaxpr = jex_core.ClosedJaxpr
    Jaxpr = jex_core.Jaxpr
    JaxprEqn = jex_core.JaxprEqn
    Literal = jex_core.Literal
    Var = jex_core.Var

# Scans longer than this run inside the enclave whole rather than be unrolled.
MAX_UNROLL = 64

dot_general_p = prims.dot_general_p
conv_p = prims.conv_general_dilated_p


def _identity_primitive(name: str) -> jex_core.Primitive:
    """A primitive that returns its argument under every transformation."""
    primitive = jex_core.Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda aval: aval)
    ad.deflinear2(primitive, lambda cotangent, _: [cotangent])
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda _, operand: [operand])
    return primitive


# Marks an output that the function itself makes public; see `tempo_jax.reveal`.
reveal_p = _identity_primitive("tempo_reveal")
# Marks the operands of an update that may run on blinded values; see `cheap_update`.
cheap_p = _identity_primitive("tempo_cheap_update")
# Marks an operand that is blinded for its own uses alone; see `_matrix_form`.
blind_p = _identity_primitive("tempo_blind")


def _keep_rule(cotangent: Any, _: Any) -> list[Any]:
    return [keep_p.bind(cotangent)]


# Marks a value that no product may show, nor that of its gradient; see `tempo_jax.keep_inside`.
keep_p = _identity_primitive("tempo_keep_inside")
ad.deflinear2(keep_p, _keep_rule)


def _primitive_of(function: Callable[..., Any], *arguments: Any) -> jex_core.Primitive:
    """The primitive to which a call traces, for those that JAX does not export."""
    return jax.make_jaxpr(function)(*arguments).jaxpr.eqns[0].primitive


_DEBUGGING = {
    _primitive_of(lambda x: jax.debug.callback(lambda _: None, x), 0.0),
    _primitive_of(lambda x: jax.debug.print("{}", x), 0.0),
}
_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
_CALLBACKS = {
    _primitive_of(lambda x: jax.pure_callback(lambda y: y, _SCALAR, x), 0.0),
    _primitive_of(lambda x: io_callback(lambda y: y, _SCALAR, x), 0.0),
}
optimization_barrier_p = _primitive_of(lax.optimization_barrier, 0.0)
_random_unwrap_p = _primitive_of(jax.random.key_data, jax.random.key(0))
# Calls whose body is inlined, with the parameter that holds it.
_INLINED = {
    prims.jit_p: "jaxpr",
    prims.closed_call_p: "call_jaxpr",
    prims.call_p: "call_jaxpr",
    prims.custom_jvp_call_p: "call_jaxpr",
    prims.custom_vjp_call_p: "call_jaxpr",
    prims.remat_p: "jaxpr",
}
# Placement hints for one array system; the enclave has one processor and no mesh.
_PLACEMENT_HINTS = {prims.device_put_p, prims.sharding_constraint_p}


def is_key_array(aval: Any) -> bool:
    """Whether this is an array of typed `jax.random` keys."""
    return jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


@dataclasses.dataclass(frozen=True)
class Flattening:
    """Which control flow `flatten` dissolves.

    Attributes:
      worth: whether an equation is worth offloading; a scan that holds one is unrolled.
      notes: collects what a reader of `explain` should know.
    """

    worth: Callable[[JaxprEqn], bool]
    notes: list[str]


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def subjaxprs(eqn: JaxprEqn) -> Iterator[Any]:
    """The open jaxprs in an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def equations(jaxpr: Any) -> Iterator[JaxprEqn]:
    """All equations of a jaxpr at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in subjaxprs(eqn):
            yield from equations(inner)


def without_locations() -> contextlib.AbstractContextManager[None]:
    """Leaves source files and lines out of what is lowered, so that equal programs are equal bytes.

    They would differ between machines, and would tell a reader where the code lies.
    """
    return jax_config.traceback_in_locations_limit(0)


def at_source_of(eqn: JaxprEqn) -> contextlib.AbstractContextManager[None]:
    """While this lasts, traced equations count as coming from where `eqn` comes from."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)


def bind(eqn: JaxprEqn, arguments: Sequence[Any], **changes: Any) -> list[Any]:
    """Evaluates one equation on `arguments`, with some parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    with at_source_of(eqn), eqn.ctx.manager:
        result = eqn.primitive.bind(*arguments, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


def source(eqn: JaxprEqn) -> str:
    """Where in the user's program an equation comes from, as `file:line (function)`."""
    return source_info_util.summarize(eqn.source_info)


def line(eqn: JaxprEqn) -> str:
    """Where an equation comes from as `file.py:line`, without the folders of this machine."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    return "unknown" if frame is None else f"{Path(frame.file_name).name}:{frame.start_line}"


def forward_only(eqns: Iterable[JaxprEqn], outputs: Sequence[Any]) -> list[JaxprEqn]:
    """The equations that `outputs` depend on, in order."""
    needed = {v for v in outputs if isinstance(v, Var)}
    kept = []
    for eqn in reversed(list(eqns)):
        if any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed |= {v for v in eqn.invars if isinstance(v, Var)}
    return kept[::-1]


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants and how many are carried."""
    if "num_consts" in params:  # JAX 0.10
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = map(len, params["ft_in"].unpack())  # JAX 0.11-0.12
    return constants, carried


class _Flattener:
    """Evaluates a jaxpr on tracers, dissolving calls, so that a flat trace comes out.

    Every value is carried as (tracer, cheap): `cheap` says that it descends from a value
    marked by `cheap_p`. Control flow over such values is dissolved as well, since an
    update that stays behind in a `cond` could not run on blinded values.
    """

    def __init__(self, options: Flattening):
        self._options = options

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], cheap: Sequence[bool]
    ) -> list[tuple[Any, bool]]:
        env = {v: (c, False) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        env.update(zip(jaxpr.invars, zip(arguments, cheap, strict=True), strict=True))

        def read(v: Any) -> tuple[Any, bool]:
            return (v.val, False) if isinstance(v, Literal) else env[v]

        for eqn in forward_only(jaxpr.eqns, jaxpr.outvars):
            operands = [read(v) for v in eqn.invars]
            results = self._equation(eqn, [x for x, _ in operands], [c for _, c in operands])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(
        self, eqn: JaxprEqn, arguments: list[Any], cheap: list[bool]
    ) -> list[tuple[Any, bool]]:
        primitive = eqn.primitive
        if primitive in _INLINED:
            body = _closed(eqn.params[_INLINED[primitive]])
            return self.evaluate(body.jaxpr, body.consts, arguments, cheap)
        if primitive in _PLACEMENT_HINTS:
            return list(zip(arguments, cheap, strict=True))
        if primitive is prims.cond_p and (any(cheap[1:]) or self._marks(eqn)):
            return self._select(eqn, arguments, cheap)
        if primitive is prims.scan_p:
            worth = any(self._options.worth(e) for e in equations(eqn.params["jaxpr"].jaxpr))
            if worth or any(cheap) or self._marks(eqn):
                if eqn.params["length"] <= MAX_UNROLL:
                    return self._unroll(eqn, arguments, cheap)
                self._options.notes.append(
                    f"a scan of length {eqn.params['length']} at {source(eqn)} runs in the enclave "
                    f"whole: scans of up to {MAX_UNROLL} steps are unrolled"
                )
        tainted = primitive is cheap_p or any(cheap)
        params = {k: _without_debugging(v) for k, v in eqn.params.items()}
        return [(x, tainted) for x in bind(eqn, arguments, **params)]

    @staticmethod
    def _marks(eqn: JaxprEqn) -> bool:
        return any(e.primitive is cheap_p for j in subjaxprs(eqn) for e in equations(j))

    def _select(
        self, eqn: JaxprEqn, arguments: list[Any], cheap: list[bool]
    ) -> list[tuple[Any, bool]]:
        """Evaluates every branch of a `cond` and selects: branches are pure."""
        index, *operands = arguments
        branches = [
            self.evaluate(b.jaxpr, b.consts, operands, cheap[1:]) for b in eqn.params["branches"]
        ]
        if len(branches) == 1:
            return branches[0]
        if len(branches) == 2:
            which = index.astype(bool)
        else:
            which = lax.clamp(jnp.int32(0), index, jnp.int32(len(branches) - 1))
        results = []
        for cases in zip(*branches, strict=True):
            values = [x for x, _ in cases]
            same = all(x is values[0] for x in values)
            chosen = values[0] if same else lax.select_n(which, *values)
            results.append((chosen, any(c for _, c in cases)))
        return results

    def _unroll(
        self, eqn: JaxprEqn, arguments: list[Any], cheap: list[bool]
    ) -> list[tuple[Any, bool]]:
        params = eqn.params
        body, length = params["jaxpr"], params["length"]
        constants, carried = _scan_counts(params)
        pairs = list(zip(arguments, cheap, strict=True))
        fixed, carry = pairs[:constants], pairs[constants : constants + carried]
        scanned = pairs[constants + carried :]
        stacked: list[list[tuple[Any, bool]]] = []
        steps = range(length)
        for step in reversed(steps) if params["reverse"] else steps:
            slices = [(lax.index_in_dim(x, step, keepdims=False), c) for x, c in scanned]
            inputs = [*fixed, *carry, *slices]
            results = self.evaluate(
                body.jaxpr, body.consts, [x for x, _ in inputs], [c for _, c in inputs]
            )
            carry, out = results[:carried], results[carried:]
            stacked.append(out)
        if params["reverse"]:
            stacked.reverse()
        outputs = list(carry)
        for index, variable in enumerate(eqn.outvars[carried:]):
            if not length:
                outputs.append((lax.full(variable.aval.shape, 0, variable.aval.dtype), False))
                continue
            parts = [out[index] for out in stacked]
            joined = lax.concatenate([lax.expand_dims(x, [0]) for x, _ in parts], 0)
            outputs.append((joined, any(c for _, c in parts)))
        return outputs


def trace(function: Callable[..., Any], avals: Sequence[Any]) -> ClosedJaxpr:
    """Traces a function of flat arguments."""
    return cast(ClosedJaxpr, jax.make_jaxpr(function)(*avals))


def flatten(closed: ClosedJaxpr, options: Flattening) -> ClosedJaxpr:
    """Traces a program anew with calls inlined and worthwhile control flow dissolved.

    Returns:
      An equivalent jaxpr, without dead equations, whose remaining control flow runs whole.
    """
    flattener = _Flattener(options)
    if any(eqn.effects for eqn in equations(closed.jaxpr)):
        # Mutable references become values; what effects remain are the debugging callbacks'.
        closed = cast(ClosedJaxpr, discharge_state(cast(Any, closed)))

    def run(*arguments: Any) -> list[Any]:
        results = flattener.evaluate(
            closed.jaxpr, closed.consts, arguments, [False] * len(arguments)
        )
        # A constant output becomes an equation's, so that every output is a variable.
        return [
            x if isinstance(x, Tracer) else prims.copy_p.bind(jnp.asarray(x)) for x, _ in results
        ]

    return trace(run, avals_of(closed))


def merge_equal(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Traces a flat program anew with equal values computed once.

    What rematerialization computes again, or an unrolled scan stacks up and slices again,
    counts as the same value, so that a gradient is recognised as that of the product it
    belongs to.
    """
    jaxpr = closed.jaxpr

    def run(*arguments: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))
        known: dict[Any, list[Any]] = {}
        made: dict[int, tuple[JaxprEqn, list[Any]]] = {}

        def name(v: Any) -> Any:
            if not isinstance(v, Literal):
                return id(env[v])
            value = np.asarray(v.val)
            return value.dtype, value.shape, value.tobytes(), v.aval.weak_type

        for eqn in jaxpr.eqns:
            # Parameters that are no numbers, tuples or the like compare by identity.
            key = (eqn.primitive, tuple(sorted(eqn.params.items())), *map(name, eqn.invars))
            try:
                results = known.get(key)
            except TypeError:
                key = results = None
            if results is None:
                operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
                same = _undone(eqn, made.get(id(operands[0]))) if operands else None
                results = bind(eqn, operands) if same is None else [same]
                made.setdefault(id(results[0]), (eqn, operands))
                if key is not None:
                    known[key] = results
            env.update(zip(eqn.outvars, results, strict=True))
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    return trace(run, avals_of(closed))


def _undone(eqn: JaxprEqn, maker: tuple[JaxprEqn, list[Any]] | None) -> Any:
    """The value that an equation takes out again of what `maker` put together, or None."""
    if maker is None:
        return None
    source, operands = maker
    shape = eqn.outvars[0].aval.shape
    if eqn.primitive is prims.squeeze_p:
        # `expand_dims` is a broadcast that repeats nothing.
        expands = (prims.broadcast_in_dim_p, prims.reshape_p)
        fits = source.primitive in expands and len(operands) == 1
        return operands[0] if fits and jnp.shape(operands[0]) == shape else None
    if eqn.primitive is not prims.slice_p or source.primitive is not prims.concatenate_p:
        return None
    along, start = source.params["dimension"], eqn.params["start_indices"]
    if any(s for i, s in enumerate(start) if i != along) or set(eqn.params["strides"] or ()) - {1}:
        return None
    at = 0
    for operand in operands:
        if at == start[along] and jnp.shape(operand) == shape:
            return operand
        at += jnp.shape(operand)[along]
    return None


def avals_of(closed: ClosedJaxpr) -> list[jax.ShapeDtypeStruct]:
    """Types of a program's inputs, to trace it anew."""
    return [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in closed.jaxpr.invars
    ]


def debugging(jaxpr: Any) -> list[JaxprEqn]:
    """The debugging callbacks of a jaxpr at any depth; `flatten` leaves them out."""
    return [eqn for eqn in equations(jaxpr) if eqn.primitive in _DEBUGGING]


def _without_debugging(param: Any) -> Any:
    """An equation's parameter with the debugging callbacks of its jaxprs removed."""
    if isinstance(param, (tuple, list)) and type(param) in (tuple, list):
        return type(param)(_without_debugging(p) for p in param)
    jaxpr = param.jaxpr if isinstance(param, ClosedJaxpr) else param
    if not isinstance(jaxpr, Jaxpr) or not debugging(jaxpr):
        return param
    eqns = [
        eqn.replace(
            params={k: _without_debugging(v) for k, v in eqn.params.items()},
            effects=frozenset(),
        )
        for eqn in jaxpr.eqns
        if eqn.primitive not in _DEBUGGING
    ]
    bare = jaxpr.replace(eqns=eqns, effects=frozenset())
    return ClosedJaxpr(bare, param.consts) if isinstance(param, ClosedJaxpr) else bare


def is_callback(eqn: JaxprEqn) -> bool:
    """Whether an equation calls back into Python for a result."""
    return eqn.primitive in _CALLBACKS


def evaluate(eqns: Iterable[JaxprEqn], env: dict[Any, Any], outputs: Sequence[Any]) -> list[Any]:
    """Evaluates flat equations on the values in `env` and returns `outputs`."""
    env = dict(env)

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in eqns:
        env.update(zip(eqn.outvars, bind(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in outputs]


def physical(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the array that represents a value; differs for typed keys only."""
    struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.eval_shape(jax.random.key_data, struct) if is_key_array(aval) else struct


def to_physical(x: Any) -> Any:
    """Typed `jax.random` keys as their uint32 data; anything else as it is."""
    return jax.random.key_data(x) if is_key_array(jax.typeof(x)) else x


def from_physical(x: Any, aval: Any) -> Any:
    """Inverse of `to_physical` for a value of this type."""
    if not is_key_array(aval):
        return x
    # JAX 0.10-0.12: a key type's implementation has no public name.
    return jax.random.wrap_key_data(x, impl=aval.dtype._impl.name)


def is_revealed(v: Any, made_by: Mapping[Any, JaxprEqn]) -> bool:
    """Whether a value is the result of `reveal` itself (for typed keys, its data)."""
    eqn = made_by.get(v)
    if eqn is not None and eqn.primitive is _random_unwrap_p:
        eqn = made_by.get(eqn.invars[0])
    return eqn is not None and eqn.primitive is reveal_p


def under_trace() -> bool:
    """Whether the caller is being traced by `jit`, `scan` or the like."""
    return jex_core.unsafe_am_i_under_a_jit_DO_NOT_USE()  # pyright: ignore[reportPrivateImportUsage]
