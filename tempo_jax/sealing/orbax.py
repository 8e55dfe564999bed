"""Orbax refuses to save sealed values: what it would write are their names and not their content.

To Orbax a sealed value is a node whose leaves are arrays with the dtype of typed random keys, which
it saves. Its handler of JAX arrays is replaced by one that looks at the dtype first. Orbax is never
imported here: nothing is done until somebody else has. Untrusted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import jax

from tempo_jax.errors import SealedValueError
from tempo_jax.jaxprs import opaque

_guarded: list[Any] = []  # the handler that was registered


def guard() -> None:
    """Makes an imported Orbax refuse sealed values at save; cheap when that is done."""
    handlers: Any = getattr(sys.modules.get("orbax.checkpoint"), "type_handlers", None)
    if handlers is None or _guarded:
        return
    usual = handlers.get_type_handler(jax.Array)
    kind: Any = type(usual)

    class Handler(kind):
        async def serialize(
            self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
        ) -> Any:
            for value, info in zip(values, infos, strict=True):
                if opaque.is_opaque(value):
                    raise SealedValueError(
                        f"orbax: `{info.name}` is inside a sealed value, of which Orbax would save "
                        "an opaque name that ends with the enclave. Save `enclave.checkpoint("
                        "state)` as an array of bytes, `np.frombuffer(data, np.uint8)`"
                    )
            return await super().serialize(values, infos, args)

    guarded = copy.copy(usual)
    guarded.__class__ = Handler
    handlers.register_type_handler(jax.Array, guarded, override=True)
    _guarded.append(guarded)
