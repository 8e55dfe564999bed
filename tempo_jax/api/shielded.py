"""Shielded functions: from a call's arguments to planned, provisioned, running programs.

Arguments are checked here, once. Untrusted.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from enclave_runtime.protocol.program import DEVICE
from enclave_runtime.protocol.tags import Rules
from tempo_jax.api.allowance import Allowance, Provision, Runs, Signed, Tags
from tempo_jax.api.allowance import rules as make_rules
from tempo_jax.api.estimate import Estimate, Machine, Step, estimated, machine_named
from tempo_jax.api.options import Options
from tempo_jax.api.signature import Signature, argument_leaves, carried, leaf_paths
from tempo_jax.api.statics import Statics
from tempo_jax.enclave.enclave import OWN_TRANSFERS
from tempo_jax.errors import RoleError, SecrecyError, UnsupportedError
from tempo_jax.jaxprs import trace, transforms
from tempo_jax.jaxprs import types as jaxpr_types
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import Plan, make_plan, offloaded
from tempo_jax.planning.request import Request
from tempo_jax.reporting.figures import Figures
from tempo_jax.reporting.notices import tell_of_signature, warn_of
from tempo_jax.reporting.report import Report
from tempo_jax.running.call import Runtime, Traffic, first_device
from tempo_jax.running.expectation import Expectation
from tempo_jax.running.observation import active_views
from tempo_jax.running.transformed import (
    batched,
    refuse_differentiation,
    refuse_sealed,
    unknown_outputs,
)
from tempo_jax.schemes import SCHEMES, Scheme
from tempo_jax.sealing.array import (
    BLINDED,
    PUBLISHED,
    RESIDENT,
    SealedArray,
    is_sealed,
)

P = ParamSpec("P")
R = TypeVar("R")

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside_shield", default=False)


class _PlannedSignature:
    """A traced signature: its plan and, once it runs, its runtime and what was allowed."""

    def __init__(
        self, plan: Plan, out_structure: Any, types: list[Any], signed: Signed, seconds: float
    ):
        self.plan = plan
        self.seconds = seconds  # that tracing and planning took
        self.out_structure = out_structure
        self.types = types
        self.signed = signed
        self.runtime: Runtime | None = None
        self.allowance: Allowance | None = None


class Shielded(Generic[P, R]):
    """A shielded function; make one with `shield`.

    Call it like the original. `explain` says what runs where and what crosses.
    """

    def __init__(self, function: Callable[P, R], options: Options):
        """Wraps a function; users call `shield`."""
        # Without the function's attributes: a wrapped function's may bear the names of ours.
        functools.update_wrapper(self, function, updated=())
        self._function: Callable[..., Any] = function
        self._options = options
        self._enclave = options.enclave
        self._public = options.public_names(function)
        self._host_chosen = options.host_chosen_names(function)
        self._statics = Statics.of(
            function, self._name, options.static_argnums, options.static_argnames
        )
        self._programs: dict[Any, list[_PlannedSignature]] = {}
        self._told: set[str] = set()  # of which warnings
        self._batched: dict[Any, Shielded[..., Any]] = {}
        self._lock = threading.RLock()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    # Arguments

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        args, kwargs = self._statics.hold(args, kwargs)
        leaves: list[Any] = []
        public: set[int] = set()
        for name, argument in (*enumerate(args), *sorted(kwargs.items())):
            flat = jax.tree.leaves(argument, is_leaf=is_sealed)
            if name in self._public:
                public |= {i + len(leaves) for i, x in enumerate(flat) if not _is_secret(x)}
            leaves += flat
        structure = jax.tree.structure((args, kwargs), is_leaf=is_sealed)
        names = functools.partial(argument_leaves, self._function, args, kwargs)
        return Signature(leaves, structure, frozenset(public), names)

    def _inputs(self, signature: Signature, tracing: bool) -> list[Any]:
        """The flat arguments as the runtime takes them: sealed, or arrays where public."""
        inputs = []
        for i, x in enumerate(signature.leaves):
            if is_sealed(x) and not _is_secret(x) and i not in signature.public:
                raise SecrecyError(
                    f"shield: {self._called(signature, i)} is published, and expected to be a "
                    "secret. Name it in `public=`, or have the client seal it."
                )
            elif is_sealed(x):
                inputs.append(self._enclave.check_owned(x))
            elif i in signature.public:
                inputs.append(jaxpr_types.to_physical(jnp.asarray(x)))
            elif isinstance(x, Tracer):
                raise SecrecyError(
                    f"shield: {self._called(signature, i)} is a plain {x.aval.str_short()} "
                    "inside jit, scan or another transformation, where a secret is expected: its "
                    "value is already the host's. Seal it with `enclave.seal` outside and pass the "
                    "sealed value in, or name the argument in `public=`."
                )
            elif tracing:
                raise SecrecyError(
                    f"shield: {self._called(signature, i)} is a plain array that a surrounding "
                    "jit or scan would keep in its program. Seal it with `enclave.seal` outside "
                    "and pass the sealed value in, or name the argument in `public=`."
                )
            elif not (self._enclave.is_client or self._enclave.follows):
                raise RoleError(
                    f"shield: {self._called(signature, i)} is plain, and the host has no key to "
                    "seal it with. Pass what the client sealed (`tempo.load_sealed`), or name the "
                    "argument in `public=` on both sides."
                )
            else:
                inputs.append(self._enclave.seal(x))
        return inputs

    def _called(self, signature: Signature, number: int) -> str:
        return f"{signature.named(number)} of `{self._name}`"

    @property
    def _name(self) -> str:
        return getattr(self._function, "__name__", type(self._function).__name__)

    # Plans

    def _program(self, signature: Signature) -> _PlannedSignature:
        """The plan for a signature, made at the first call.

        Leaves that lie on the devices are used there if an earlier plan already does so, else a
        plan is made that tries to.
        """
        with self._lock:
            programs = self._programs.setdefault(signature.key, [])
            for program in programs:
                wanted = program.plan.request.on_devices | program.plan.placement.resident
                if signature.on_devices <= wanted:
                    return program
            # Of what is weighed it is not known yet whether anything leaves.
            if self._options.offloads and not self._options.weighs_costs:
                self._enclave.prepare(self._options.scheme.name)
            made = self._make(signature, self._options)
            if offloaded(made.plan):
                self._enclave.prepare(self._options.scheme.name)
            programs.append(made)
            return made

    def _make(
        self, signature: Signature, options: Options, costs: CostModel | None = None
    ) -> _PlannedSignature:
        """Traces and plans a signature; `costs` instead of the enclave's measured ones.

        A mesh of `jax.set_mesh` says nothing of the enclave, which has one processor. A function
        that asks for it, as `with_sharding_constraint` does, is traced under it nevertheless.
        """
        if trace.mesh_around():
            with contextlib.suppress(Exception), trace.without_mesh():
                return self._traced(signature, options, costs)
        return self._traced(signature, options, costs)

    def _traced(
        self, signature: Signature, options: Options, costs: CostModel | None
    ) -> _PlannedSignature:
        start = time.perf_counter()
        structures: list[Any] = []

        # JAX's errors while tracing name the function and its arguments after what is traced.
        @functools.wraps(self._function)
        def traced(*args: Any, **kwargs: Any) -> list[Any]:
            leaves = [
                jaxpr_types.from_physical(x, a)
                for x, a in zip(jax.tree.leaves((args, kwargs)), signature.avals, strict=True)
            ]
            args, kwargs = self._statics.release(jax.tree.unflatten(signature.structure, leaves))
            with tracing_inside():
                result = self._statics.hold_leaves(self._function(*args, **kwargs))
            out, structure = jax.tree.flatten(result)
            parts = result if type(result) is tuple else ()
            structures.append((structure, (structure, *map(jax.tree.structure, parts))))
            structures.append([jax.typeof(x) for x in out])
            return [_physical_output(x) for x in out]

        physical = [_physical(a) for a in signature.avals]
        args, kwargs = jax.tree.unflatten(signature.structure, physical)
        closed = trace.trace(traced, args, kwargs)
        (out_structure, parts), types = structures
        if costs is None and options.weighs_costs:
            costs = self._enclave.costs
        request = Request(
            closed=closed,
            carried=carried(signature, parts, types),
            public=signature.public,
            on_devices=signature.on_devices,
            scheme=options.scheme,
            costs=costs if options.weighs_costs else None,
            offload=options.offloads,
            workers=options.workers,
            verify=options.verify,
            unroll_while=options.unroll_while,
            reveal_checks=options.reveal_checks,
            shard_weights=options.shard_weights,
        )
        signed = Signed(
            self._name,
            argument_leaves(self._function, args, kwargs),
            leaf_paths(jax.tree.unflatten(out_structure, types)),
            frozenset(name for name in self._host_chosen if isinstance(name, str)),
        )
        plan = make_plan(request)
        seconds = time.perf_counter() - start
        return _PlannedSignature(plan, out_structure, types, signed, seconds)

    def _runtime(self, program: _PlannedSignature, allowance: Allowance | None = None) -> Runtime:
        """What runs a program; provisioned again where more or less is allowed than before."""
        with self._lock:
            if program.runtime is None or allowance not in (None, program.allowance):
                program.allowance = allowance or Allowance()
                plan = program.plan
                names = [f"argument {i}" for i in range(len(plan.jaxpr.invars))]
                figures = Figures(self._name, plan, names, self._enclave.costs)

                def labels() -> list[str]:
                    return [", ".join(v.layers) for v in figures.costs.visits]

                def expected() -> float | None:
                    # What is only kept may be computed after the answer, where nobody times it.
                    return figures.busy_seconds if plan.revealed else None

                mesh, doubt = self._options.mesh, self._enclave.doubt_costs
                shared = first_device(mesh).platform == "cpu"
                program.runtime = Runtime(
                    plan,
                    self._enclave,
                    mesh,
                    labels,
                    self._rules(program),
                    Expectation(self._name, expected, doubt, shared=shared),
                )
                given = program.runtime.provisioned
                tell_of_signature(
                    figures, program.seconds, given.export_seconds, given.compile_seconds
                )
                warn_of(figures, self._told)
            return program.runtime

    def _rules(self, program: _PlannedSignature) -> Rules:
        # A client that is the host as well need not be held to what it allowed itself.
        alone = not self._enclave.is_host
        return make_rules(program.signed, program.plan, program.allowance if alone else None)

    def _donated(self, plan: Plan) -> list[int]:
        """Inputs that a call consumes; what is revealed replaces no state."""
        carried = plan.request.carried
        if not self._options.donate or not set(carried.values()).isdisjoint(plan.revealed):
            return []
        return sorted(carried)

    # Public

    @OWN_TRANSFERS
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the shielded function; see `shield`."""
        if _inside.get():
            return self._function(*args, **kwargs)
        self._enclave.check_process()
        if not self._enclave.is_host:
            raise RoleError(
                f"shield: `{self._name}` runs on the host, and this is the client's side "
                "(`Enclave.connect`): call `.provision(...)` here, and call the function on the "
                "enclave's machine with `enclave=Enclave.attach(...)`."
            )
        signature = self._signature(args, kwargs)
        vmapped = transforms.innermost_vmap(signature.leaves)
        if vmapped is not None:
            return self._under_vmap(vmapped, signature.structure)
        refuse_differentiation(self._name, signature.leaves)
        tracing = trace.under_trace() or any(
            isinstance(x, Tracer) for x in jax.tree.leaves(signature.leaves)
        )
        try:
            inputs = self._inputs(signature, tracing)
        except SecrecyError as error:
            if not transforms.under_eval_shape():
                raise
            program = self._program(signature)
            session = self._enclave.session
            outputs = unknown_outputs(program.plan, program.types, session, error)
            return jax.tree.unflatten(program.out_structure, outputs)
        program = self._program(signature)
        runtime = self._runtime(program)
        donated = self._donated(program.plan)
        if tracing:
            if active_views():
                raise UnsupportedError(
                    "host_view records calls outside jit only; call the shielded function directly"
                )
            outputs = runtime.trace(inputs, program.types, donated)
        else:
            outputs = runtime.call(inputs, program.types, active_views())
            self._enclave.donate([signature.leaves[i] for i in donated], outputs)
        for i, aval in enumerate(program.types):
            if aval.dtype == jax.dtypes.float0:
                outputs[i] = np.zeros(aval.shape, jax.dtypes.float0)
        return self._statics.release(jax.tree.unflatten(program.out_structure, outputs))

    def _under_vmap(self, vmapped: transforms.Vmapped, structure: Any) -> Any:
        """Runs the batched plan, that of ``shield(jax.vmap(f))``."""
        with self._lock:
            key = structure, vmapped.key
            if key not in self._batched:
                function = batched(self._function, vmapped, structure)
                self._batched[key] = Shielded(function, self._options)
            mapped = self._batched[key]
        args, kwargs = jax.tree.unflatten(structure, vmapped.values)
        with vmapped.outside():
            refuse_sealed(self._name, mapped._program(mapped._signature(args, kwargs)).plan.sealed)
            result = mapped(*args, **kwargs)
        return jax.tree.map(vmapped.inside, result)

    def provision(
        self,
        *args: Any,
        tags: Tags | None = None,
        allow_any: Sequence[str] = (),
        allow_forks: bool = False,
        runs_per_batch: Runs = "auto",
        retries: int = 8,
        **kwargs: Any,
    ) -> Provision:
        """Gives the enclave the program for such arguments, so that the host may run it.

        The client calls this; then `shield` of the same function finds the program on the host
        (`Enclave.attach`), by the hash of its description and of its code. Called on the
        host, it checks that the client did.

        Where a state is carried whose returned form needs a plan of its own (a leaf that comes
        back weakly typed, or lies on the devices from then on), that is provisioned as well.

        Arrays that the function closes over go to the enclave encrypted, and on the host only
        their shapes and dtypes matter. Of two programs that differ in such arrays alone, the host
        gets the one provisioned last.

        The host of an enclave that serves is held to rules, of which the client says more with
        the options below. An argument takes what the client sealed under its name
        (``enclave.seal(state, tag="state")``), whole and in place; one that carries state also
        takes what this function returned in its stead, all of it from one run, and each generation
        once; a `public` one takes what the client published under its name (`Enclave.publish`).
        Anything else is refused with an `AdmissionError`. Provisioning again replaces the rules
        for arguments of the same shapes and forms; what was allowed for others stays allowed. A
        launched enclave refuses nothing, since its client is its host, and on the host the options
        say nothing. A parameter of the function that has an option's name is passed by position.

        Args:
          *args: arguments as for a call; only structure, shapes, dtypes and, of sealed values,
            where they lie matter. `jax.ShapeDtypeStruct` stands for an array.
          tags: by an argument's name, which tag or tags it takes in place of its name. What
            another function made is tagged with its name: ``{"params": "train_step.state[0]"}``
            takes the first part of the state that `train_step` carries, ``"encode.result[1]"`` the
            second thing that `encode` returns.
          allow_any: names of arguments that take every sealed value of their types, from
            anywhere: the host may then show any of your values to this program. A public one then
            takes what the host chooses.
          allow_forks: whether a generation of the carried state may be used by several runs: the
            host may then try other batches on one state, and compare what they reveal.
          runs_per_batch: how many runs of this function may use what was sealed in one call, or
            made by one run, for an argument that carries no state; None for any number, and a dict
            says it by arguments' names. By default 1 for a function that carries state, and any
            number for others. Each run shows the value under fresh blindings, and many of them tell
            which of some guesses it is (SECURITY.md, *Guesses*).
          retries: how many more runs than count may be begun on a value, for what fails or is
            interrupted.
          **kwargs: arguments as for a call.

        Returns:
          What the enclave has now: print it to see what each argument takes. Its `digest` is the
          hash of the program for the arguments as given.

        Raises:
          UnprovisionedError: on the host, if the client did not provision it.
          UnsupportedError: an option names no argument, or is no count.
        """
        signature = self._signature(args, kwargs)
        program = self._program(signature)
        allowance = Allowance(tags or {}, allow_any, allow_forks, runs_per_batch, retries)
        allowance.check(program.signed)
        provisioned = []
        while program not in provisioned:
            self._runtime(program, allowance)
            provisioned.append(program)
            signature = self._following(signature, program)
            program = self._program(signature)
        first = provisioned[0]
        named = [first.signed.leaves[i][0] for i in sorted(first.plan.request.public)]
        return Provision(
            self._runtime(first).digest,
            self._rules(first) if self._enclave.is_client else None,
            tuple(dict.fromkeys(n for n in named if n not in first.signed.host_chosen)),
            tuple(dict.fromkeys(n for n in named if n in first.signed.host_chosen)),
        )

    def _following(self, signature: Signature, program: _PlannedSignature) -> Signature:
        """The signature of the next call, whose state is the one that this call returns."""
        plan, leaves = program.plan, list(signature.leaves)
        places = dict(zip(plan.sealed, (p.place for p in plan.program.outputs), strict=True))
        for i, position in plan.request.carried.items():
            if position in places:
                aval = program.types[position]
                form = BLINDED if places[position] == DEVICE else RESIDENT
                leaves[i] = SealedArray(
                    (None, None),
                    form,
                    aval.shape,
                    aval.dtype,
                    aval.weak_type,
                    self._enclave.session,
                )
        return Signature(leaves, signature.structure, signature.public, signature.names)

    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """What runs where, under which keys, and what crosses, without running anything.

        Args:
          *args: arguments as for a call; only shapes and dtypes matter.
          **kwargs: likewise.

        Returns:
          A report: print it, look at it in a notebook, or `save` it as a page.
        """
        signature = self._signature(args, kwargs)
        plan = self._program(signature).plan
        names = ["".join(leaf) for leaf in signature.names()]
        return Report(self._name, plan, names, self._enclave.costs)

    def estimate(self, *args: Any, machine: Machine | str = "here", **kwargs: Any) -> Estimate:
        """What a step would take on a machine, from shapes alone; nothing is run.

        Compares the plain step on the device, the step all in the enclave, and shielded under
        each scheme, and says from which batch on each beats all inside. The batch is the leading
        axis that most arrays share which carry no state (or of the last argument, where none
        does); it is doubled and halved, and the function traced anew for each.

        Args:
          *args: arguments as for a call; only shapes and dtypes matter.
          machine: "here" (no accelerator), a name such as "h100", or a `Machine`.
          **kwargs: likewise.

        Raises:
          UnsupportedError: no machine has that name.
        """
        where = machine_named(machine) if isinstance(machine, str) else machine
        signature = self._signature(args, kwargs)
        inside = dataclasses.replace(self._options, placement="enclave")
        first = self._make(signature, inside).plan
        state = first.request.carried
        args, _ = self._statics.hold(args, kwargs)
        if not state and args:
            last = len(jax.tree.leaves(args[-1], is_leaf=is_sealed))
            before = len(jax.tree.leaves(args, is_leaf=is_sealed)) - last
            state = [i for i in range(len(signature.avals)) if not 0 <= i - before < last]

        def plan(scheme: Scheme | None, costs: CostModel, avals: Sequence[Any]) -> Plan:
            scaled = Signature(list(avals), signature.structure, signature.public, signature.names)
            options = inside
            if scheme is not None:
                auto = {"placement": "auto", "offload": "auto", "scheme": scheme}
                options = dataclasses.replace(self._options, **auto)
            return self._make(scaled, options, costs).plan

        schemes = {name: scheme() for name, scheme in SCHEMES.items()}
        schemes[self._options.scheme.name] = self._options.scheme
        step = Step(self._name, signature.avals, frozenset(state), plan)
        return estimated(step, where, self._enclave.costs, schemes)

    def traffic(self, *args: Any, **kwargs: Any) -> Traffic:
        """Bytes and round trips that calls with such arguments have cost so far.

        Args:
          *args: arguments as for a call; only shapes and dtypes matter.
          **kwargs: likewise.
        """
        return self._runtime(self._program(self._signature(args, kwargs))).traffic


def _physical(aval: Any) -> jax.ShapeDtypeStruct:
    struct = jaxpr_types.physical(aval)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, weak_type=aval.weak_type)


def _physical_output(x: Any) -> Any:
    if jax.typeof(x).dtype == jax.dtypes.float0:
        # The gradient of an integer: there is nothing in it but its shape.
        return jnp.zeros(())
    return jaxpr_types.to_physical(jnp.asarray(x))


def is_inside() -> bool:
    """Whether a shielded function is being traced."""
    return _inside.get()


@contextlib.contextmanager
def tracing_inside() -> Iterator[None]:
    """While a shielded function is traced, shielded functions it calls become part of it."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def _is_secret(x: Any) -> bool:
    return is_sealed(x) and x.form != PUBLISHED
