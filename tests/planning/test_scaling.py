"""Planning is linear in the program, and equal layers are exported once, however many there are.

Work is counted, in calls of Python functions and in exports, and not timed.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest

from tempo_jax.planning import export
from tempo_jax.planning.plan import make_plan
from tempo_jax.schemes import Mixing, Orthogonal, Tempo
from tests.support.interpreter import plan
from tests.support.steps import SIGNED_PERMUTATION, Training, training, uniform

SCHEMES = [SIGNED_PERMUTATION, Orthogonal(), Tempo(), Mixing()]
WIDTH, ROWS = 64, 128

_f32 = functools.partial(uniform, dtype=jnp.float32)


def dense(layers: int) -> Training:
    def loss(p, rest, x):
        for w, b in p:
            x = jnp.tanh(x @ w + b)
        return jnp.square(x).mean(), (rest, x)

    p = [(_f32(1, WIDTH, WIDTH), _f32(2, WIDTH)) for _ in range(layers)]
    return training(loss, p, [_f32(3, ROWS, WIDTH)], optax.adamw(1e-3))


def transformer(blocks: int) -> Training:
    def norm(x, scale):
        centred = x - x.mean(-1, keepdims=True)
        return scale * centred * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def loss(p, rest, x):
        for each in p:
            h = norm(x, each["first norm"])
            q, k, v = (jnp.einsum("bsd,dhk->bhsk", h, each[n]) for n in "qkv")
            weights = jax.nn.softmax(jnp.einsum("bhsk,bhtk->bhst", q, k) / 4)
            x += jnp.einsum("bhst,bhtk,hkd->bsd", weights, v, each["out"])
            h = norm(x, each["second norm"])
            x += jax.nn.gelu(h @ each["up"] + each["bias"]) @ each["down"]
        return jnp.square(x).mean(), (rest, x)

    def block():
        shapes: dict[str, tuple[int, ...]] = {n: (WIDTH, 4, 16) for n in "qkv"}
        shapes |= {"out": (4, 16, WIDTH), "up": (WIDTH, 128), "down": (128, WIDTH)}
        shapes |= {"bias": (128,), "first norm": (WIDTH,), "second norm": (WIDTH,)}
        return {name: _f32(i, *shape) for i, (name, shape) in enumerate(shapes.items())}

    return training(loss, [block() for _ in range(blocks)], [_f32(9, 4, 32, WIDTH)], optax.sgd(0.1))


def planned(case: Training, scheme: Any) -> Any:
    return plan(case.step, case.state, case.batches[0], stateful=True, scheme=scheme).plan


def calls_of(work: Callable[[], Any]) -> int:
    """How many Python functions a piece of work calls."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    "scheme",
    [*(pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES[:3]), SCHEMES[3]],
    ids=lambda s: s.name,
)
def test_planning_twice_the_layers_is_twice_the_work(scheme):
    requests = [planned(dense(layers), scheme).request for layers in (4, 8, 16)]
    first, second, third = (calls_of(functools.partial(make_plan, request)) for request in requests)
    # What does not grow with the program drops out of the differences.
    assert third - second < 2.2 * (second - first)


@pytest.mark.parametrize("model", [dense, pytest.param(transformer, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", [SIGNED_PERMUTATION, Mixing()], ids=lambda s: s.name)
def test_more_layers_are_no_more_exports(model, scheme, monkeypatch):
    exports = []
    real = jax.export.export
    monkeypatch.setattr(jax.export, "export", lambda *a, **k: exports.append(1) or real(*a, **k))
    counts = []
    for layers in (4, 8):
        exports.clear()
        made = planned(model(layers), scheme)
        blobs = list(export.export_segments(made.cut))
        assert len(exports) == len(set(blobs)) < len(blobs)
        counts.append(len(exports))
    assert counts[0] == counts[1]
    # Nor does any of them grow with the number of layers, but the one that sends the state out.
    sizes = sorted(len(segment.eqns) for segment in made.cut.segments)
    assert sizes[-2] < 100
