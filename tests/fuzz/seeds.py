"""Writes the seeds of the corpora: ``python -m tests.fuzz.seeds``.

Run it after a format changed. Inputs that a fuzzer found have names that start with `found` and
are left alone.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tempo_jax
from enclave_runtime.protocol import evidence
from enclave_runtime.protocol.program import Program
from enclave_runtime.protocol.wire import Frame, Kind
from tempo_jax.schemes import Mixing, SignedPermutation
from tests.fuzz import fuzz_checkpoint, fuzz_configuration, fuzz_provision
from tests.fuzz.harness import CORPUS
from tests.support.interpreter import plan
from tests.support.toy_pki import COMPONENTS, Toy, sgx_extension

_OPTIMIZER = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))
SAMPLE = Path(__file__).parent.parent / "data" / "sgx_quote"


def _quotes() -> dict[str, bytes]:
    toy = Toy()
    without_chain = Toy(chain=b"", chain_ending=b"")
    quote = base64.b64encode(without_chain.quote).decode()
    shown = {"format": evidence.FORMAT, "platform": "gramine-sgx", "quote": quote}
    return {
        "sample": SAMPLE.read_bytes(),
        "toy": toy.quote,
        "without_chain": without_chain.quote,
        "extension": sgx_extension(toy.fmspc, COMPONENTS, toy.pce_svn),
        "evidence_quote": json.dumps(shown).encode(),
        "evidence_process": evidence.make_evidence(b"key", bytes(32), bytes(32)),
    }


def _frames() -> dict[str, bytes]:
    nested: Any = {"a": [{"b": [None, True, -1.5, "é", {}]}]}
    begin: dict[str, Any] = {"program": 0, "arena": "a", "workers": 1, "blind_at": [0, 64]}
    begin["inputs"] = [{"handle": "h"}, {"offset": 64}]
    leaf = {"name": "w", "array": {"shape": [2], "dtype": "int8"}, "dtype": "int8", "weak": False}
    frames = {
        "hello": Frame(Kind.HELLO, 0, {"challenge": "ab" * 32}),
        "begin": Frame(Kind.BEGIN, 7, begin),
        "settle": Frame(Kind.SETTLE, 8, {"run": 1, "offsets": {"0": 64}, "blind_at": {}}),
        "leaves": Frame(Kind.CHECKPOINT, 9, {"leaves": [leaf]}),
        "compile": Frame(Kind.COMPILE, 2, {}, bytes(range(64))),
        "nested": Frame(Kind.REPLY, (1 << 64) - 1, nested),
    }
    encoded = {name: frame.encode() for name, frame in frames.items()}
    return {
        **encoded,
        "short": encoded["hello"][:-1],
        "infinite": encoded["nested"].replace(b"-1.5", b"1e99"),
    }


def _products(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w) @ v


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (2, 1), "SAME"))


def _with_constants(x: jax.Array) -> jax.Array:
    return jnp.tanh(x + np.arange(5, dtype=np.float32)) * np.arange(1.0, 6)


def _training(state: Any, x: jax.Array) -> Any:
    """A step whose updates are followed: products, sums, multiples and changes of layout."""
    optimizer = tempo_jax.cheap_update(_OPTIMIZER)
    params, moments = state

    def loss_of(params: Any) -> jax.Array:
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"]) ** 2)

    changes, moments = optimizer.update(jax.grad(loss_of)(params), moments, params)
    return optax.apply_updates(params, changes), moments


def _convolutional_training(state: Any, x: jax.Array) -> Any:
    optimizer = tempo_jax.cheap_update(_OPTIMIZER)
    kernel, moments = state
    gradient = jax.grad(lambda k: jnp.mean(_convolution(x, k) ** 2))(kernel)
    changes, moments = optimizer.update(gradient, moments, kernel)
    return optax.apply_updates(kernel, changes), moments


def _state(params: Any) -> Any:
    return params, tempo_jax.cheap_update(_OPTIMIZER).init(params)


def _program(scheme: Any, *shapes: tuple[int, ...], **options: Any) -> bytes:
    operands = (np.ones(shape, np.float32) for shape in shapes)
    return _described(options.pop("function", _products), *operands, scheme=scheme, **options)


def _described(function: Any, *operands: Any, **options: Any) -> bytes:
    planned: Program = plan(function, *operands, **options).plan.program
    segments = tuple(
        dataclasses.replace(segment, executable=f"{number:064x}")
        for number, segment in enumerate(planned.segments)
    )
    return json.dumps(dataclasses.replace(planned, segments=segments).encode()).encode()


def _programs() -> dict[str, bytes]:
    ones = functools.partial(np.ones, dtype=np.float32)
    followed = {"scheme": SignedPermutation(), "verify": True, "stateful": True}
    params = _state({"first": ones((5, 4)), "second": ones((4, 3))})
    kernel = _state(ones((5, 4, 3, 3)))
    return {
        "updates": _described(_training, params, ones((6, 5)), **followed),
        "updates_convolution": _described(
            _convolutional_training, kernel, ones((3, 4, 6, 6)), **followed
        ),
        "permutation": _program(SignedPermutation(), (6, 5), (5, 4), (4, 3)),
        "mixing": _program(Mixing(), (128, 64), (64, 64), (64, 64)),
        "verified": _program(SignedPermutation(), (6, 5), (5, 4), (4, 3), verify=True),
        "verified_convolution": _program(
            SignedPermutation(), (3, 4, 6, 6), (5, 4, 3, 3), function=_convolution, verify=True
        ),
    }


def main() -> None:
    """Writes all seeds."""
    constants = _program(SignedPermutation(), (6, 5), function=_with_constants)
    for target, made in (
        ("quote", _quotes()),
        ("wire", _frames()),
        ("configuration", fuzz_configuration.made_seeds()),
        ("program", _programs()),
        ("provision", fuzz_provision.made_seeds(constants)),
        ("checkpoint", fuzz_checkpoint.made_seeds()),
    ):
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in made.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
