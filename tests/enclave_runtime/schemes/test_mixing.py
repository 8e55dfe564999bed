"""The schemes through a real enclave: exact, keys as fresh as promised, nothing in the clear."""

import ast
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax.sharding import Mesh
from scipy.spatial.distance import cdist

import enclave_runtime
import tempo_jax as tempo
from benchmarks.attacks import structure
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import KeyClass, Layout
from enclave_runtime.schemes.kernels import hadamard
from enclave_runtime.sessions.run import _last_uses
from tempo_jax.schemes import Mixing, Orthogonal, Tempo
from tests.support.steps import assert_close, uniform

TOLERANCE = 1e-9  # of Mixing; of the others, 1e-10
DECOYS = Mixing(decoy_rows=32, mask_energy=0.0)


class Convolutional(linen.Module):
    """Two convolutions wide enough to go out, batch normalization, and a classifier."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for strides in (1, 2):
            x = linen.Conv(64, (3, 3), (strides, strides), param_dtype=jnp.float64)(x)
            x = linen.LayerNorm(param_dtype=jnp.float64)(jax.nn.relu(x))
        return linen.Dense(10, param_dtype=jnp.float64)(x.mean((1, 2)))


class Block(linen.Module):
    """A transformer block with its head."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = {"param_dtype": jnp.float64}
        h = linen.LayerNorm(**kind)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, **kind)(h, h)
        h = linen.gelu(linen.Dense(256, **kind)(linen.LayerNorm(**kind)(x)))
        return linen.Dense(64, **kind)(x + linen.Dense(128, **kind)(h))


def training_step(model: Any, tx: Any) -> Any:
    def loss_fn(parameters, x, y):
        logits = model.apply(parameters, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state[0], *batch)
        updates, moments = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), moments), tempo.reveal(loss)

    return step


def started(model: Any, tx: Any, batch: Any) -> Any:
    parameters = model.init(jax.random.key(0), batch[0])
    return parameters, tx.init(parameters)


MODELS = {
    "cnn": (Convolutional(), (uniform(1, 2, 12, 12, 64), jnp.arange(2))),
    "transformer": (Block(), (uniform(2, 1, 128, 128), jnp.arange(128)[None] % 64)),
}


# Of the schemes that other files try on every model, one model is enough where time counts.
STEPS = {
    "mixing": (None, optax.adamw(1e-3), TOLERANCE),
    "decoys": (DECOYS, optax.adamw(1e-3), TOLERANCE),
    "tempo": (Tempo(), tempo.cheap_update(optax.sgd(0.1, momentum=0.9)), 1e-10),
    "integers": (Tempo("integers"), tempo.cheap_update(optax.sgd(0.1)), 1e-10),
    "orthogonal": (
        Orthogonal(2),
        tempo.cheap_update(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9))),
        1e-10,
    ),
}


@pytest.mark.parametrize(
    ("model", "scheme", "tx", "tolerance"),
    [
        pytest.param(
            model,
            *step,
            id=f"{name}-{model}",
            marks=() if name == "mixing" or model == "cnn" else pytest.mark.slow,
        )
        for name, step in STEPS.items()
        for model in MODELS
    ],
)
def test_new_state_equals_the_plain_steps(model, scheme, tx, tolerance, enclave):
    network, batch = MODELS[model]
    step = training_step(network, tx)
    state = started(network, tx, batch)
    shielded: Any = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
    sealed = enclave.seal(state)
    for _ in range(3):
        state, loss = jax.jit(step)(state, batch)
        sealed, revealed = shielded(sealed, batch)
        assert_close(revealed, loss, tolerance)
    assert_close(enclave.open(sealed), state, tolerance)


def two_layers(p, x):
    h = jnp.tanh(x @ p["a"])
    return jnp.square(jnp.tanh(h @ p["b"]) @ p["c"]).mean()


def small() -> tuple[Any, jax.Array]:
    p = {n: uniform(i, 64, 64) for i, n in enumerate("abc")}
    return p, uniform(7, 128, 64)


def test_runs_under_jit_and_on_a_mesh(enclave):
    arguments = small()
    expected = jax.grad(two_layers)(*arguments)
    mesh = Mesh(np.array(jax.devices()[:2]), ("workers",))
    options: dict[str, Any]
    for options in ({}, {"mesh": mesh}):
        shielded = tempo.shield(jax.grad(two_layers), enclave=enclave, offload="all", **options)
        if options:
            assert shielded.explain(*arguments).plan.sharded
        result = enclave.open(shielded(*arguments))
        assert_close(result, expected, tolerance=TOLERANCE)
    shielded = tempo.shield(jax.grad(two_layers), enclave=enclave, offload="all")
    result = enclave.open(jax.jit(shielded)(*map(enclave.seal, arguments)))
    assert_close(result, expected, tolerance=TOLERANCE)


def test_product_that_is_an_output_can_be_opened(enclave):
    x, w = uniform(1, 128, 64), uniform(2, 64, 64)
    shielded = tempo.shield(lambda x, w: x @ w, enclave=enclave, offload="all", donate=False)
    assert_close(enclave.open(shielded(x, w)), x @ w, tolerance=TOLERANCE)


def views_of(enclave: tempo.Enclave, calls: int, scheme: Any = None) -> list[Any]:
    arguments = small()
    shielded = tempo.shield(
        jax.grad(two_layers), enclave=enclave, scheme=scheme, offload="all", donate=False
    )
    views = []
    for _ in range(calls):
        with tempo.testing.host_view() as view:
            shielded(*arguments)
        views.append(view)
    return views


def shows(plain: np.ndarray, seen: np.ndarray) -> bool:
    """Whether any row or column of the one stands in the other, in any order, sign and scale."""
    if plain.ndim != 2 or seen.ndim != 2:
        return False
    for a, b in ((plain, seen), (plain.T, seen.T)):
        if a.shape[1] == b.shape[1] > 1:
            profiles = [np.sort(np.abs(v), axis=1) for v in (a, b)]
            profiles = [v / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-300) for v in profiles]
            if cdist(*profiles).min() < 1e-6:
                return True
    return False


def test_every_step_has_keys_of_its_own(enclave):
    first, second = views_of(enclave, 2)
    for one, other in zip(first.products, second.products, strict=True):
        for a, b in zip(one.operands, other.operands, strict=True):
            cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
            assert abs(cosine) < 0.1
            # Not even the singular values repeat, as they would under orthogonal keys.
            s, t = (np.linalg.svd(v, compute_uv=False) for v in (a, b))
            assert np.abs(s / s[0] - t / t[0]).max() > 1e-3


@pytest.mark.parametrize("scheme", [Tempo(), Orthogonal(5)], ids=lambda s: s.name)
def test_rows_have_fresh_keys_while_weights_keep_theirs(scheme, enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.0))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    shielded: Any = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all")
    state, views = shielded(p, x), []
    for _ in range(3):
        with tempo.testing.host_view() as view:
            state = shielded(state, x)
        views.append(view)
    checked = 0
    for first, second in itertools.combinations(views, 2):
        for (_, a), (_, b) in zip(first.leaves, second.leaves, strict=True):
            assert np.array_equal(a, b)
        for one, other in zip(first.products, second.products, strict=True):
            for a, b in zip(one.operands, other.operands, strict=True):
                if len(x) in a.shape:
                    # With one row key for both these would be equal: all else is.
                    cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
                    assert abs(cosine) < 0.3
                    checked += 1
    assert checked == 3 * (3 + 2 + 6)  # X of 3 products, G of 2, and X and G of 3


@pytest.mark.parametrize("scheme", [Mixing(), DECOYS], ids=["masks", "decoys"])
def test_rows_have_decoys_and_norms_are_hidden(scheme, enclave):
    (view,) = views_of(enclave, 1, scheme)
    p, x = small()
    rows = {n for product in view.products for v in product.operands for n in v.shape if n > 64}
    assert rows == {192 if scheme.decoy_rows else 128}
    norms = {
        round(float(np.sqrt(np.mean(v**2))), 6)
        for product in view.products
        for v in product.operands
    }
    plain = {round(float(np.sqrt(np.mean(np.square(v)))), 6) for v in (x, *p.values())}
    assert not norms & plain


@pytest.mark.parametrize(("decoy_rows", "hidden"), [(32, True), (0, False)])
def test_decoys_hide_the_rank_of_rows(enclave, decoy_rows, hidden):
    # A key is invertible and keeps the rank; only decoys, in a basis of their own, raise it.
    scheme = Mixing(decoy_rows=decoy_rows, mask_energy=0)
    multiply = tempo.shield(lambda w, x: x @ w, enclave=enclave, scheme=scheme, offload="all")
    x = np.outer(uniform(1, 128), uniform(2, 64))
    with tempo.testing.host_view() as view:
        multiply(enclave.seal(uniform(3, 64, 64)), x)
    ((rows, _),) = [product.operands for product in view.products]
    values = np.linalg.svd(rows, compute_uv=False)
    assert (values[1] > 0.1 * values[0]) == hidden


def test_host_sees_no_plain_row_or_column(enclave):
    (view,) = views_of(enclave, 1)
    p, x = small()
    h = np.tanh(np.asarray(x @ p["a"]))
    for plain in map(np.asarray, (x, h, *p.values())):
        assert not any(shows(plain, seen) for seen in view.arrays())
        # Decoys below a tensor in the clear would not hide it.
        assert shows(plain, np.concatenate([uniform(9, 64, plain.shape[1]), plain]))


def test_host_sees_every_row_and_column_under_permutations(enclave):
    """The weak control of the test above."""
    (view,) = views_of(enclave, 1, tempo.schemes.SignedPermutation())
    p, x = small()
    for plain in map(np.asarray, (x, *p.values())):
        assert any(shows(plain, seen) for seen in view.arrays())


def test_zero_gradient_comes_back_as_zero(enclave):
    p, x = small()

    def loss(p, x):
        return two_layers(p, x) * 0.0

    shielded = tempo.shield(jax.grad(loss), enclave=enclave, offload="all")
    assert_close(enclave.open(shielded(p, x)), jax.tree.map(jnp.zeros_like, p), tolerance=0.0)


def test_cheap_update_saves_encryptions(enclave):
    p, x = small()
    counts = {}
    for name, mark in (("kept", tempo.cheap_update), ("anew", lambda tx: tx)):
        tx = mark(optax.sgd(0.1))

        def step(state, x, tx=tx):
            grads = jax.grad(two_layers)(state, x)
            return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

        shielded = tempo.shield(step, enclave=enclave, scheme=Tempo(), offload="all")
        saved = shielded.explain(p, x).encryptions_saved
        state = shielded(p, x)
        before = enclave.statistics()["blindings"]
        shielded(state, x)
        counts[name] = saved, enclave.statistics()["blindings"] - before
    assert counts["kept"][0] == 3 and counts["anew"][0] == 0
    # Each weight is blinded for its products; the copies for its gradient come on top.
    assert counts["anew"][1] + 2 * 3 - counts["kept"][1] >= 3


def test_budget_of_orthogonal_keys(enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.0))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    shielded = tempo.shield(step, enclave=enclave, scheme=Orthogonal(budget=2), offload="all")
    state, leaves = p, []
    for _ in range(5):
        with tempo.testing.host_view() as view:
            state = shielded(state, x)
        leaves.append(np.asarray(view.leaves[0][1]))
    # A learning rate of zero: what lies on the devices changes with its keys alone.
    changed = [not np.allclose(a, b) for a, b in zip(leaves, leaves[1:], strict=False)]
    assert changed == [False, True, False, True]
    assert_close(enclave.open(state), p)


def test_budget_runs_out_inside_jit(enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    shielded = tempo.shield(step, enclave=enclave, scheme=Orthogonal(budget=1), offload="all")
    jitted = jax.jit(shielded)
    sealed = shielded(enclave.seal(p), x)
    x_sealed = enclave.seal(x)
    p = step(p, x)
    for _ in range(3):
        sealed, p = jitted(sealed, x_sealed), step(p, x)
    assert_close(enclave.open(sealed), p)


def test_budget_counts_runs_that_return_no_weights(enclave):
    p, x = small()
    tx = tempo.cheap_update(optax.sgd(0.0))

    def step(state, x):
        grads = jax.grad(two_layers)(state, x)
        return optax.apply_updates(state, tx.update(grads, tx.init(state), state)[0])

    scheme = Orthogonal(budget=3)
    train = tempo.shield(step, enclave=enclave, scheme=scheme, offload="all", donate=False)
    evaluate = tempo.shield(
        lambda state, x: tempo.reveal(two_layers(state, x)),
        enclave=enclave,
        scheme=scheme,
        offload="all",
        donate=False,
    )
    state = train(p, x)
    leaves = []
    for _ in range(4):
        with tempo.testing.host_view() as view:
            evaluate(state, x)
        leaves.append(np.asarray(view.leaves[0][1]))
    assert np.array_equal(leaves[0], leaves[1])
    assert not np.allclose(leaves[1], leaves[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_formats(dtype, enclave):
    x, w = (uniform(i, *s, dtype=dtype) for i, s in ((1, (128, 64)), (2, (64, 64))))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    shielded = tempo.shield(lambda x, w: x @ w, enclave=enclave, offload="all", donate=False)
    blinded = np.asarray(enclave.open(shielded(x, w)), np.float64)
    plain = np.asarray(x @ w, np.float64)
    # SECURITY.md: 15 to 25 times plain's rounding; the bound leaves room for one draw's luck.
    error, usual = (np.linalg.norm(v - exact) for v in (blinded, plain))
    assert error < 40 * usual


def test_enclave_draws_from_no_other_generator():
    root = pathlib.Path(enclave_runtime.__file__).parent
    for path in root.rglob("*.py"):
        if root / "gramine" in path.parents:
            continue  # builds the enclave and never runs in it
        assert not other_generators(path.read_text()), path


def other_generators(source: str) -> list[str]:
    """Names by which a generator that is not for cryptography could be reached."""
    forbidden = {"random", "numpy.random", "jax.random", "scipy.stats"}
    nodes = list(ast.walk(ast.parse(source)))
    imports = [a for node in nodes if isinstance(node, ast.Import) for a in node.names]
    packages = {a.asname: a.name for a in imports}
    found = []
    for node in nodes:
        names = set()
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {f"{packages.get(node.value.id, node.value.id)}.{node.attr}"}
        elif isinstance(node, ast.Import):
            names = {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
        found += [n for n in names for f in forbidden if n == f or n.startswith(f"{f}.")]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "import random as r",
        "import numpy.random",
        "import jax.random as jr",
        "from numpy import random",
        "from jax import random as jr",
        "from random import SystemRandom",
        "from numpy.random import default_rng",
        "from jax.random import key, bits",
        "np.random.default_rng(0)",
        "f(np.random)",
        "numpy.random.normal()",
        "jax.random.key(0)",
    ],
)
def test_other_generators_are_noticed(source):
    assert other_generators(f"import numpy as np\n{source}")
    assert not other_generators("import secrets\nfrom jax.extend import random_bits\nx.random")


@pytest.mark.parametrize(("rounds", "found"), [(2, True), (3, False)])
def test_blocks_of_a_key_show_under_two_rounds_only(rounds, found):
    """The Gram matrix of a blinded tensor must not show which rows share a Hadamard block."""
    key = hadamard.draw(KeySchedule().stream("test"), 256, condition=4.0, rounds=rounds)
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 256, 256))
    seen = hadamard.mix(x, {0: key}), hadamard.mix(g, {0: key.inverse_transpose()})
    blocks = structure.find_blocks(seen[:1], seen[1:], rng)
    share = structure.share_right(blocks, key.order[0, -1] // 64)
    assert share > 0.95 if found else share < 0.45


def leading(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix)[0][:, :4]


def blinded_weight(scheme: Mixing, w: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """What `blind` tells of a weight, its layout, and what is left when the keys are taken off."""
    schedule = KeySchedule()
    keys = {i: scheme.draw(KeyClass(n), schedule.stream("key", i)) for i, n in enumerate(w.shape)}
    layout, out = Layout((0, 1), (0, 1)), np.empty_like(w)
    secret = scheme.blind(w, layout, keys, out, lambda: schedule.stream("tensor"))
    maps = {0: keys[0].element.transpose(), 1: keys[1].element.inverse()}
    return secret, layout, hadamard.unmix(out, maps) / secret.scalars


@pytest.mark.parametrize(("traded", "shown"), [(0, True), (8, False)])
def test_strongest_directions_of_a_weight_are_traded_for_random_ones(traded, shown):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(96, 64)) + 4 * rng.normal(size=(96, 4)) @ rng.normal(size=(4, 64))
    scheme = Mixing(decoy_rows=32, traded=traded, mask_energy=0.0)
    secret, _, seen = blinded_weight(scheme, w)
    assert (secret.trade is None) == shown
    w = secret.tensor.scaled
    for a, b in ((w, seen), (w.T, seen.T)):
        overlap = np.square(leading(a).T @ leading(b)).sum() / 4
        assert overlap > 0.999 if shown else overlap < 0.5
    # Rounding does not grow: the mask takes away about as much as it adds.
    assert 0.5 < np.linalg.norm(seen) / np.linalg.norm(w) < 1.5


@pytest.mark.parametrize("scheme", [Mixing(), DECOYS], ids=["masks", "decoys"])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e35, np.inf, np.nan])
def test_masks_take_any_weight(value, scheme):
    w = np.full((64, 64), value, np.float32)
    _, _, seen = blinded_weight(scheme, w)
    assert np.isfinite(seen).all() and np.abs(seen).max() > 0


def test_operands_are_kept_until_their_last_product(enclave):
    program = tempo.shield(jax.grad(two_layers), enclave=enclave).explain(*small()).plan.program
    assert not _last_uses(program), "everything stays inside"
    plan = tempo.shield(jax.grad(two_layers), enclave=enclave, offload="all").explain(*small()).plan
    uploads = [(i, c) for i, s in enumerate(plan.program.segments) for c in s.uploads]
    last = _last_uses(plan.program)
    for index, crossing in uploads:
        assert all(last[operand] >= index for operand in crossing.operands or ())
    assert len(set(last.values())) > 1, "what is used early is let go early"
    w = uniform(1, 64, 64, dtype="float32")
    for scheme in (Mixing(), DECOYS):
        secret, _, _ = blinded_weight(scheme, np.asarray(w))
        left = scheme.let_go(secret)
        assert left.masked is None and left.trade is None and left.tensor is None
        assert left.scalars is secret.scalars


def test_gradients_through_a_frozen_weight_have_decoys(enclave):
    """No gradient of the weight ties the rows of X and G together, as in low-rank adaptation."""
    p, x = small()

    def loss(x):
        return two_layers(p, x)

    shielded = tempo.shield(
        jax.grad(loss), enclave=enclave, scheme=DECOYS, offload="all", donate=False
    )
    with tempo.testing.host_view() as view:
        result = shielded(x)
    assert_close(enclave.open(result), jax.grad(loss)(x), tolerance=TOLERANCE)
    for product in view.products:
        rows = product.operands[0].shape[-2]
        assert rows == 192, "rows of every first operand have decoys below them"


def test_mixing_uses_three_rounds():
    key = Mixing().draw(KeyClass(64, decoys=64), KeySchedule().stream("test"))
    assert key.element.order.shape == (1, 4, 128)


def test_default_is_mixing(enclave):
    report = tempo.shield(jax.grad(two_layers), enclave=enclave).explain(*small())
    assert report.plan.request.scheme == Mixing()
