"""Arrays on which JAX computes nothing: what names a sealed value on the host.

Such an array has an extended dtype, that of a key whose generator refuses every use. Arithmetic
with one raises in JAX itself, and the dtype's name in its message says what to do; `jit`, `scan`,
`cond`, `where`, `device_put` and donation take it as they take any array. Public interfaces of
JAX only (`jax.extend.random`), 0.10 to 0.12: a dtype of our own would take the rules of
`jax._src.dtypes.ExtendedDType`, which change between them.

What makes an array of zeros or ones without arithmetic (`jnp.zeros_like`) gets through; a check
value behind the name tells it from one that the enclave gave. It is for recognising mistakes: the
host can compute it, and the enclave believes no handle because of it. Untrusted and pure.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import random as jex_random

NAME_WORDS, CHECK_WORDS = 4, 2  # of uint32
WORDS = NAME_WORDS + CHECK_WORDS
WHAT_TO_DO = (
    "a sealed value: compute with it inside a function under tempo.shield, "
    "or decrypt it with enclave.open"
)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(f"this array stands for {WHAT_TO_DO}")


_OPAQUE = jex_random.define_prng_impl(
    key_shape=(WORDS,),
    seed=_refuse,
    split=_refuse,
    random_bits=_refuse,
    fold_in=_refuse,
    name="tempo_sealed",
    tag=WHAT_TO_DO,
)


def named_words(name: bytes) -> np.ndarray:
    """A name of 16 bytes with its check value, uint32[6]."""
    check = hashlib.sha256(b"tempo_jax handle" + name).digest()[: 4 * CHECK_WORDS]
    return np.frombuffer(name + check, np.uint32).copy()


def name_of(words: Any) -> bytes | None:
    """The name in such words; None if the check value is not its own."""
    name = np.asarray(words)[:NAME_WORDS].tobytes()
    return name if np.array_equal(named_words(name), words) else None


def opaque(words: Any) -> Any:
    """The opaque array of such words, uint32[..., 6]."""
    return jax.random.wrap_key_data(words, impl=_OPAQUE)


@functools.cache
def _dtype() -> Any:
    return jax.eval_shape(opaque, jax.ShapeDtypeStruct((WORDS,), np.uint32)).dtype


def is_opaque(x: Any) -> bool:
    """Whether an array, tracer or abstract value has the opaque dtype."""
    return getattr(x, "dtype", None) == _dtype()


def words_of(x: Any) -> Any:
    """The words of an opaque array; anything else as it is."""
    if not is_opaque(x):
        return x
    if isinstance(x, Tracer):
        return jax.random.key_data(x)
    with jax.ensure_compile_time_eval():  # under a trace as well
        return jax.random.key_data(x)
