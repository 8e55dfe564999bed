"""The options of `shield`, checked once where they are given.

Untrusted.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from jax.sharding import Mesh

from enclave_runtime.protocol.limits import MAX_WORKERS
from tempo_jax.enclave.enclave import Enclave
from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs.flatten import MAX_UNROLL
from tempo_jax.running.spanning import check_processes
from tempo_jax.schemes import Mixing, Scheme


class OptionFields(TypedDict, total=False):
    """The keywords of `shield` for type checkers: the fields of `Options`."""

    enclave: Enclave
    scheme: Scheme | None
    public: Sequence[str | int] | int
    host_chosen: Sequence[str | int] | int
    placement: str
    offload: str
    mesh: Mesh | None
    shard_weights: bool
    donate: bool
    verify: bool
    unroll_while: int
    static_argnums: int | Sequence[int] | None
    static_argnames: str | Iterable[str] | None
    debug_nans: bool
    reveal_checks: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a function is shielded; `shield` says what each option means.

    Raises:
      UnsupportedError: an option has an unknown value.
    """

    enclave: Enclave
    scheme: Scheme = dataclasses.field(default_factory=Mixing)
    public: Sequence[str | int] | int = ()
    host_chosen: Sequence[str | int] | int = ()
    placement: str = "auto"
    offload: str = "auto"
    mesh: Mesh | None = None
    shard_weights: bool = False
    donate: bool = True
    verify: bool = False
    unroll_while: int = 0
    static_argnums: int | Sequence[int] | None = None
    static_argnames: str | Iterable[str] | None = None
    debug_nans: bool = False
    reveal_checks: bool = False

    def __post_init__(self) -> None:
        """Checks every option that needs no function."""
        if not isinstance(self.enclave, Enclave):
            raise UnsupportedError(
                f"shield: enclave is a {type(self.enclave).__name__}, expected what "
                "`Enclave.launch()`, `.connect(...)` or `.attach(...)` returns"
            )
        if self.scheme is None:
            object.__setattr__(self, "scheme", Mixing())
        if isinstance(self.scheme, type) and issubclass(self.scheme, Scheme):
            name = self.scheme.__name__
            raise UnsupportedError(f"shield: scheme is the class `{name}`; call it: `{name}()`")
        if not isinstance(self.scheme, Scheme):
            raise UnsupportedError(
                f"shield: scheme is a {type(self.scheme).__name__}, expected an object such as "
                "`tempo_jax.schemes.Mixing()`"
            )
        _check("placement", self.placement, ("auto", "enclave"))
        _check("offload", self.offload, ("auto", "all"))
        if type(self.unroll_while) is not int or not 0 <= self.unroll_while <= MAX_UNROLL:
            raise UnsupportedError(
                f"shield: unroll_while is {self.unroll_while!r}, expected an integer from 0 to "
                f"{MAX_UNROLL}, the iterations of each `while_loop` that are computed in any case"
            )
        _check("shard_weights", self.shard_weights, (True, False))
        _check("donate", self.donate, (True, False))
        _check("verify", self.verify, (True, False))
        _check("debug_nans", self.debug_nans, (True, False))
        _check("reveal_checks", self.reveal_checks, (True, False))
        if self.debug_nans and not (self.enclave.is_client and self.enclave.is_host):
            raise UnsupportedError(
                "shield: debug_nans runs a step again to find where a NaN comes from, which the "
                "rules of an enclave that serves do not let a host do. Debug with "
                "`Enclave.launch()`, where client and host are one process"
            )
        if self.mesh is not None and not isinstance(self.mesh, Mesh):
            raise UnsupportedError(
                f"shield: mesh is a {type(self.mesh).__name__}, expected a mesh of devices with "
                'one axis, such as `jax.make_mesh((2,), ("devices",))`'
            )
        check_processes(self.mesh, self.enclave)
        if self.workers > MAX_WORKERS:
            raise UnsupportedError(
                f"shield: mesh has {self.workers} devices, expected at most {MAX_WORKERS}, each of "
                "which the enclave serves on a connection and a thread of its own"
            )

        if self.shard_weights:
            self._check_shard_weights()

    def _check_shard_weights(self) -> None:
        scheme = self.scheme
        if self.workers == 1:
            raise UnsupportedError(
                "shield: shard_weights splits weights over the devices of a mesh, and there is "
                "none of several devices. Pass `mesh=`, or leave `shard_weights` out"
            )
        if not self.offloads or scheme.key_budget == 0 or scheme.keys_per_product:
            raise UnsupportedError(
                "shield: shard_weights splits weights and optimizer state that lie on the devices, "
                f"and under {scheme.name} with placement={self.placement!r} none does: they are "
                "the enclave's. Take a scheme that keeps keys, which protects less, or leave "
                "`shard_weights` out"
            )

    def check_devices(self) -> None:
        """Checks that the scheme runs on these devices.

        Raises:
          UnsupportedError: it does not.
        """
        axes = None if self.mesh is None else dict(self.mesh.shape)
        why = self.scheme.refuses_devices(axes) if self.offloads else None
        if why is not None:
            raise UnsupportedError(f"shield: {why}")

    @property
    def offloads(self) -> bool:
        """Whether anything may leave the enclave."""
        return self.placement == "auto"

    @property
    def weighs_costs(self) -> bool:
        """Whether only what costs the enclave less outside leaves it."""
        return self.offloads and self.offload == "auto"

    @property
    def workers(self) -> int:
        """Devices of the mesh, 1 without one."""
        return 1 if self.mesh is None else self.mesh.size

    def public_names(self, function: Callable[..., Any]) -> frozenset[str | int]:
        """Names and positions of the arguments of a function that the host may know.

        Raises:
          UnsupportedError: it has no such argument, or one is named as both kinds.
        """
        authentic, chosen = self._named(function, "public"), self.host_chosen_names(function)
        if both := authentic & chosen:
            raise UnsupportedError(
                f"shield: public and host_chosen both name {min(map(str, both))!r}; name it once: "
                "what is public comes from the client, what is host_chosen from the host"
            )
        return authentic | chosen

    def host_chosen_names(self, function: Callable[..., Any]) -> frozenset[str | int]:
        """Names and positions of the public arguments that the host chooses.

        Raises:
          UnsupportedError: the function has no such argument.
        """
        return self._named(function, "host_chosen")

    def _named(self, function: Callable[..., Any], option: str) -> frozenset[str | int]:
        given = getattr(self, option)
        names = list(inspect.signature(function).parameters)
        both: set[str | int] = set()
        for item in (given,) if isinstance(given, (str, int)) else given:
            known = item in names if isinstance(item, str) else 0 <= item < len(names)
            if not known:
                raise UnsupportedError(
                    f"shield: {option} names {item!r}, but the arguments are {', '.join(names)}"
                )
            both |= {item, names.index(item) if isinstance(item, str) else names[item]}
        return frozenset(both)


def _check(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        expected = ", ".join(map(str, known))
        raise UnsupportedError(f"shield: {name} is {value!r}, expected one of {expected}")
