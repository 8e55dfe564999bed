"""A call's arguments, flat: their types and names, and which of them carry state.

Untrusted; looks at no value.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tempo_jax.jaxprs import trace
from tempo_jax.sealing.array import BLINDED, is_sealed, leaf_type


class Signature:
    """A call's arguments, flat, as far as planning needs them.

    `names` gives a name for each in two parts, see `argument_leaves`.
    """

    def __init__(
        self,
        leaves: list[Any],
        structure: Any,
        public: frozenset[int],
        names: Callable[[], Sequence[tuple[str, str]]],
    ):
        self.leaves = leaves
        self.structure = structure
        self.public = public
        self.names = names
        self.avals = [
            leaf_type(x, "shield", functools.partial(self.named, i)) for i, x in enumerate(leaves)
        ]

    def named(self, number: int) -> str:
        """What to call an argument in an error."""
        return f"argument `{''.join(self.names()[number])}`"

    @property
    def key(self) -> Any:
        types = tuple((a.shape, a.dtype, a.weak_type) for a in self.avals)
        return self.structure, types, self.public, trace.settings_key()

    @property
    def on_devices(self) -> frozenset[int]:
        """Positions of leaves that lie blinded on the devices."""
        forms = enumerate(self.leaves)
        return frozenset(i for i, x in forms if is_sealed(x) and x.form == BLINDED)


def carried(signature: Signature, parts: Sequence[Any], types: Sequence[Any]) -> dict[int, int]:
    """Leaves of the arguments that carry state, and their outputs.

    These are arguments that follow each other and have the types of the first parts of the
    result, one by one, or one argument that has those of the whole. A bare array that is
    not the first argument is none: a batch may look like what a model makes of it.

    Args:
      signature: of the call.
      parts: structures of the whole result and, of a tuple, of its parts.
      types: abstract values of the flat outputs.
    """
    args, _ = jax.tree.unflatten(signature.structure, signature.avals)
    flat = [jax.tree.flatten(argument) for argument in args]
    starts = [sum(len(leaves) for leaves, _ in flat[:i]) for i in range(len(flat))]

    def agrees(i: int, structure: Any, start: int) -> bool:
        leaves, own = flat[i]
        return own == structure and all(
            (x.shape, x.dtype) == (y.shape, y.dtype)
            for x, y in zip(leaves, types[start:], strict=False)
        )

    for i, (leaves, structure) in enumerate(flat):
        if not leaves or (i and jax.tree_util.treedef_is_leaf(structure)):
            continue
        if structure == parts[0] and agrees(i, parts[0], 0):
            return {starts[i] + n: n for n in range(len(leaves))}
        count = start = 0
        for count, part in enumerate(parts[1:]):
            bare = count and jax.tree_util.treedef_is_leaf(part)
            if bare or i + count >= len(flat) or not agrees(i + count, part, start):
                break
            start += part.num_leaves
        if start:
            return {starts[i] + n: n for n in range(start)}
    return {}


def argument_leaves(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, str]]:
    """For each flat argument a readable name in two, such as `state` and `.params['kernel']`."""
    parameters = list(inspect.signature(function).parameters)
    names = []
    for i, argument in enumerate(args):
        root = parameters[i] if i < len(parameters) else f"argument {i}"
        names += [(root, suffix) for suffix in leaf_paths(argument)]
    for key in sorted(kwargs):
        names += [(key, suffix) for suffix in leaf_paths(kwargs[key])]
    return names


def leaf_paths(argument: Any) -> list[str]:
    """Where each leaf of a pytree lies, such as `.params['kernel']`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(argument, is_leaf=is_sealed)
    return [jax.tree_util.keystr(path) for path, _ in leaves]
