"""`shield`, the public edge.

Untrusted.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp

from tempo_jax.api.markers import reveal
from tempo_jax.api.options import OptionFields, Options
from tempo_jax.api.shielded import Shielded, is_inside
from tempo_jax.errors import NanError, UnsupportedError
from tempo_jax.jaxprs import nans, trace
from tempo_jax.sealing.array import is_sealed

P = ParamSpec("P")
R = TypeVar("R")


@overload
def shield(function: Callable[P, R], **options: Unpack[OptionFields]) -> Shielded[P, R]: ...


@overload
def shield(
    function: None = None, **options: Unpack[OptionFields]
) -> Callable[[Callable[P, R]], Shielded[P, R]]: ...


def shield(  # noqa: D417 (the options are documented one by one)
    function: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """Transforms a function so that untrusted devices compute on blinded operands only.

    Matrix products and convolutions run in this JAX process on blinded operands, everything
    else in the enclave. Results equal those of the plain function up to rounding. A scheme that
    only reorders sums adds nothing to plain's own. `Mixing` has masks of full rank, and rounds
    products by some 1e-5 in float32 where plain rounds by 1e-7: a unit that this switches (ReLU)
    can move a gradient by a hundredth of its largest element. In float64 the state after a step
    is within 1e-10. `testing.compare` tells rounding from faults.

    An argument and the result, or its first part as in `jax.lax.scan`, carry state when their
    structure, shapes and dtypes agree, and so do several arguments and as many first parts, as in
    ``params, opt_state, loss = step(params, opt_state, batch)``: such arguments are donated, and
    using them again is an error. A bare array counts as the first argument only.
    Plain arguments are sealed on the way in. Every output stays sealed unless the
    function passes it through `reveal`.

    Inside `jit`, `scan`, `while_loop` and `cond` a carried state keeps the types that it entered
    with, so that a loop takes it in any form. Weights that a freshly sealed or restored state has
    on the devices from its first step on are then kept by the host between steps; one call before
    the loop keeps them on the devices.

    Args:
      function: any function that `jax.jit` takes; omitted when used as a decorator.
      enclave: where the trusted part runs.
      scheme: how operands are blinded; `schemes.Mixing()` by default. The others keep weights
        on the devices and are cheaper; they obfuscate and do not protect (see their
        documentation).
      public: names or positions of arguments that the host may know. They change what a call
        computes, and so what it reveals: a public weight for each example's loss that is 1 for one
        and 0 for all others reads that example's loss from the batch's. So an enclave that serves
        takes for them what its client published (`Enclave.publish`).
      host_chosen: names or positions of arguments that the host may know and choose anew for each
        call. Only for what cannot be turned against the data: a number of steps, no weight.
      placement: "auto", or "enclave" to run the whole function inside.
      offload: "auto" sends a product out when that is less work for the enclave; "all" sends
        every product that can be blinded.
      mesh: a mesh with one axis to spread the blinded products over.
      shard_weights: whether each device of `mesh` keeps a part of the weights and the optimizer's
        state that lie on the devices (under `cheap_update` and a scheme that keeps keys), in place
        of a copy: a weight is gathered where a product takes it, and its gradient is added up and
        shared out in one collective, as in fully sharded data parallelism. A leaf of which the
        devices divide no axis stays whole, and `explain` says which. Processes of `jax.distributed`
        that keep parts open, copy and save the state together, see `Enclave.open`.
      donate: whether a carried state is donated.
      verify: whether the enclave checks every product that the devices return (Freivalds). A
        wrong one stops the run with an `IntegrityError` that names the equation, and the last
        state stands. A leaf stays on the devices only if its update is linear there (SGD,
        momentum, weight decay), so that a secret checksum in the enclave can follow it; others
        are updated in the enclave. `explain` says what is checked, how small an error is noticed,
        and why a leaf is not on the devices.
      unroll_while: of each `while_loop` whose body holds products worth sending out, how many
        iterations are computed in any case, their products outside; those after them run inside
        whole. How often a loop runs stays secret, and results do not depend on this number: it
        costs the enclave the blinding of iterations that were not needed. A loop that runs a
        fixed number of times is a `scan`, and needs no option.
      static_argnums: positions of arguments whose values belong to the program, as for `jax.jit`.
        Such a value is hashable and known to the host, and each new one is a program of its own.
        What a `jax.jit` around `function` has as static is static here as well, and everything
        but arrays is for `equinox.filter_jit`.
      static_argnames: their names; of positions and names one follows from the other.
      debug_nans: after each call the host learns one bit: whether the result has a NaN. If it has,
        the call is made once more, all inside, and fails with a `NanError` that names the equation
        that made the first NaN, which the host learns as well, but no value. Nothing is donated.
      reveal_checks: whether a run-time check of Equinox (`error_if`) that fails raises a
        `CheckError` with the check's message, as it would under `jax.experimental.checkify`. The
        host then learns of every call whether a check failed, and which one first; the messages
        are the program's, and no value is shown. A failed call commits nothing: its arguments are
        as they were. By default a failed check shows in values that become NaN, inside.

    Returns:
      A `Shielded` function with the parameters and the result of `function`. It warns
      (`errors.PlanWarning`) once where less than a tenth of the arithmetic leaves the enclave, and
      says what would change that, and where `mesh` or `cheap_update` has no effect.

    Raises:
      UnsupportedError: an option is unknown or has an unknown value, or `enclave` is missing.
      StaticArgumentError: `function` has no such static argument.

    Example:
      >>> import tempo_jax as tempo
      >>> with tempo.Enclave.launch() as enclave:
      ...     double = tempo.shield(lambda x: tempo.reveal(2 * x), enclave=enclave)
      ...     float(double(3.0))
      6.0

    References:
      Tempo, arXiv 2401.11531.
    """
    known = OptionFields.__annotations__
    if not options.keys() <= known.keys():
        unknown = ", ".join(sorted(options.keys() - known.keys()))
        raise UnsupportedError(
            f"shield: there is no {unknown}, expected some of {', '.join(known)}"
        )
    if "enclave" not in options:
        raise UnsupportedError(
            "shield: `enclave=` is missing, expected what `Enclave.launch()`, `.connect(...)` or "
            "`.attach(...)` returns"
        )
    checked = Options(**options)
    checked.check_devices()

    def decorate(function: Callable[P, R]) -> Shielded[P, R]:
        if not checked.debug_nans:
            return Shielded(function, checked)
        return Watched(function, checked)

    return decorate if function is None else decorate(function)


class Watched(Shielded[P, R]):
    """A shielded function whose results are looked at for NaNs, by programs beside its own."""

    def __init__(self, function: Callable[P, R], options: Options):
        """Wraps a function; users call `shield`."""
        options = dataclasses.replace(options, donate=False)
        super().__init__(function, options)
        beside = Options(enclave=options.enclave, placement="enclave", donate=False)
        self._has_nan = Shielded(_has_nan, beside)
        self._search = Shielded(self._first_nan, dataclasses.replace(beside, static_argnums=1))
        self._equations: dict[Any, list[str]] = {}  # by structure and types of the arguments

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the shielded function; see `shield`.

        Raises:
          NanError: the result has a NaN.
          UnsupportedError: it is called inside a user's jit, where nothing can be raised.
        """
        if is_inside():
            return super().__call__(*args, **kwargs)
        if trace.under_trace():
            raise UnsupportedError(
                f"shield: `{self._name}` is called inside jit or scan, where `debug_nans` can "
                "raise nothing. Call it outside"
            )
        result = super().__call__(*args, **kwargs)
        leaves = [
            x
            for x in jax.tree.leaves(result, is_leaf=is_sealed)
            if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        sealed = [x for x in leaves if is_sealed(x)]
        plain = any(bool(nans.any_nan(x)) for x in leaves if not is_sealed(x))
        if plain or (sealed and bool(self._has_nan(sealed))):
            raise NanError(self._named_nan(args, kwargs))
        return result

    def _named_nan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        signature = self._signature(args, kwargs)
        first = int(self._search(signature.leaves, signature.structure))
        start = f"shield: the result of `{self._name}` has a NaN, which "
        if first == nans.NONE:
            return f"{start}an argument has as well"
        names = self._equations[_key(signature.leaves, signature.structure)]
        return f"{start}{names[first]} made first. The arguments are as they were"

    def _first_nan(self, leaves: list[Any], structure: Any) -> Any:
        def flat(*leaves: Any) -> list[Any]:
            args, kwargs = self._statics.release(jax.tree.unflatten(structure, leaves))
            return jax.tree.leaves(self._statics.hold_leaves(self._function(*args, **kwargs)))

        first, names = nans.first_nan(trace.trace(flat, leaves), leaves)
        self._equations[_key(leaves, structure)] = names
        return reveal(first)


def _has_nan(leaves: list[Any]) -> Any:
    return reveal(jnp.any(jnp.stack([nans.any_nan(x) for x in leaves])))


def _key(leaves: list[Any], structure: Any) -> Any:
    arrays = (x if is_sealed(x) else jax.typeof(x) for x in leaves)
    return structure, tuple((x.shape, x.dtype) for x in arrays)


# For `help` and editors, the options with their defaults.
shield.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
    [
        inspect.Parameter("function", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
        *inspect.signature(Options).parameters.values(),
    ]
)
