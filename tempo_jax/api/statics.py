"""Static arguments: values that belong to a function's program, as they do for `jax.jit`.

Such a value becomes a node without leaves in the arguments' tree, and so a part of the program's
key. The host, which has the program, knows it. Untrusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from tempo_jax.errors import StaticArgumentError
from tempo_jax.jaxprs.jitted import is_filtered, static_arguments
from tempo_jax.sealing.array import is_sealed


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Static:
    """A static value in a tree; like `jit`, it tells ``1``, ``1.0`` and ``True`` apart."""

    value: Any

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, Static)
            and type(self.value) is type(other.value)
            and self.value == other.value
        )

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return f"Static({type(self.value).__name__})"


@dataclasses.dataclass(frozen=True)
class Statics:
    """Which arguments of a function are static.

    Attributes:
      name: the function's name, for errors.
      numbers: of positional arguments; negative ones count from a call's last.
      names: of keyword arguments.
      filtered: whether everything is static that is no array (`equinox.filter_jit`).
    """

    name: str
    numbers: tuple[int, ...]
    names: tuple[str, ...]
    filtered: bool

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        name: str,
        numbers: int | Sequence[int] | None,
        names: str | Iterable[str] | None,
    ) -> Statics:
        """Those that are named, and those of a function that is jitted already.

        Raises:
          StaticArgumentError: the function has no such argument.
        """
        found = [static_arguments(function)]
        if numbers is not None or names is not None:
            try:
                # Numbers follow from names and the other way round, as `jit` has it.
                jitted = jax.jit(function, static_argnums=numbers, static_argnames=names)
            except (TypeError, ValueError) as error:
                raise StaticArgumentError(f"shield: {error}") from error
            found.append(static_arguments(jitted))
        return cls(
            name,
            tuple(dict.fromkeys(n for both in found for n in both[0])),
            tuple(dict.fromkeys(n for both in found for n in both[1])),
            is_filtered(function),
        )

    def hold(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with each static value as a `Static`.

        Raises:
          StaticArgumentError: a static value cannot be hashed.
        """
        numbers = {n % len(args) for n in self.numbers if -len(args) <= n < len(args)}
        held = [self._static(x, f"argument {i}") if i in numbers else x for i, x in enumerate(args)]
        named = {
            k: self._static(x, f"argument `{k}`") if k in self.names else x
            for k, x in kwargs.items()
        }
        return self.hold_leaves((tuple(held), named))

    def hold_leaves(self, tree: Any) -> Any:
        """A tree with each static leaf as a `Static`; only a filtered function has any."""
        if not self.filtered:
            return tree

        def hold(leaf: Any) -> Any:
            return leaf if _is_array(leaf) else self._static(leaf, "a leaf of an argument")

        return jax.tree.map(hold, tree, is_leaf=is_sealed)

    def release(self, tree: Any) -> Any:
        """Inverse of `hold` and `hold_leaves`."""
        if not (self.filtered or self.numbers or self.names):
            return tree
        return jax.tree.map(
            lambda x: x.value if isinstance(x, Static) else x,
            tree,
            is_leaf=lambda x: isinstance(x, Static) or is_sealed(x),
        )

    def _static(self, value: Any, where: str) -> Static:
        kind = type(value).__name__
        if is_sealed(value):
            raise StaticArgumentError(
                f"shield: {where} of `{self.name}` is static and sealed: the program cannot depend "
                "on a value that is secret. Pass the value itself, or drop it from the static ones"
            )
        try:
            hash(value)
        except TypeError as error:
            raise StaticArgumentError(
                f"shield: non-hashable static arguments are not supported: {where} of "
                f"`{self.name}` is a {kind} ({error}). Pass a tuple or a frozen dataclass, or drop "
                "it from the static ones"
            ) from error
        return Static(value)


def _is_array(x: Any) -> bool:
    arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return is_sealed(x) or isinstance(x, arrays)
