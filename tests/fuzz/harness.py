"""Coverage-guided fuzzing of every decoder that reads what an untrusted peer wrote.

A target is a module `tests.fuzz.fuzz_NAME` with `one_input(data)`, which may raise nothing: it
catches the decoder's own error and lets everything else through. Its seeds lie in
`corpus/NAME`, and inputs that once failed stay there. One target by hand::

    python -m tests.fuzz.fuzz_quote -max_total_time=60 /tmp/found tests/fuzz/corpus/quote

`tests/fuzz/test_fuzz.py` runs each for a few seconds. Needs `atheris` (Linux on x86-64); the seeds
run without it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TARGETS = ("quote", "wire", "configuration", "program", "provision", "checkpoint")
CORPUS = Path(__file__).parent / "corpus"

OneInput = Callable[[bytes], None]
Mutator = Callable[[bytes, int, int], bytes]


def one_input(target: str) -> OneInput:
    """A target's function."""
    return importlib.import_module(f"tests.fuzz.fuzz_{target}").one_input


def seeds(target: str) -> list[Path]:
    """A target's corpus."""
    return sorted((CORPUS / target).iterdir())


def fuzz(
    run: OneInput, modules: Sequence[types.ModuleType], mutator: Mutator | None = None
) -> None:
    """Fuzzes with libFuzzer's arguments from the command line; does not return.

    Args:
      run: the target.
      modules: whose coverage guides; importing them before is fine.
      mutator: makes one input out of another, in place of libFuzzer's own way.
    """
    atheris = _atheris()
    for module in modules:
        for function in _functions(module):
            atheris.instrument_func(function)
    options = {} if mutator is None else {"custom_mutator": mutator}
    atheris.Setup(sys.argv, run, **options)
    atheris.Fuzz()


def _atheris() -> Any:
    # Not at the top: pytest imports this module also where there is no atheris.
    return importlib.import_module("atheris")


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Functions and methods that a module defines."""
    owners = [v for v in vars(module).values() if inspect.isclass(v)]
    for owner in (module, *(o for o in owners if o.__module__ == module.__name__)):
        for value in list(vars(owner).values()):
            if isinstance(value, property):
                value = value.fget
            value = getattr(value, "__func__", value)
            # Dataclasses write methods of their own, in no file of ours.
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                if value.__code__.co_filename == module.__file__:
                    yield value


# JSON documents, for which flipped bits mostly break the syntax

_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 64, 65, 127, 255, 1 << 16, 1 << 24, (1 << 31) - 1),
    *(1 << 31, 1 << 40, 1 << 42, 1 << 48, 1 << 63, 1 << 200, 0.5, -0.0, 1e308, "", "a" * 64),
    *("enclave", "device", "public", "float32", "int4", "object", [], {}, [0], [[]], [None] * 33),
)


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Changes one node of a JSON document; what is none is changed byte by byte."""
    draw = random.Random(seed)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if document is None or draw.random() < 0.1:
        return mutate_bytes(data, max_size)
    slots = list(_slots(document))
    if not slots:
        return json.dumps(draw.choice(_VALUES)).encode()[:max_size]
    container, key = draw.choice(slots)
    action = draw.randrange(5)
    if action == 0:
        del container[key]
    elif action == 1:
        other, name = draw.choice(slots)
        container[key] = json.loads(json.dumps(other[name]))
    elif action == 2 and isinstance(container, list):
        container.insert(key, container[key])
    elif action == 3 and type(container[key]) is int:
        container[key] += draw.choice((-64, -1, 1, 64))
    else:
        container[key] = draw.choice(_VALUES)
    return json.dumps(document, separators=(",", ":")).encode()[:max_size]


def mutate_bytes(data: bytes, max_size: int) -> bytes:
    """Changes bytes as libFuzzer does."""
    return _atheris().Mutate(data, max_size)


def _slots(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key or index) of every node but the root."""
    pending = [document]
    while pending:
        container = pending.pop()
        if isinstance(container, dict):
            keys = list(container)
        elif isinstance(container, list):
            keys = list(range(len(container)))
        else:
            continue
        for key in keys:
            yield container, key
            pending.append(container[key])
