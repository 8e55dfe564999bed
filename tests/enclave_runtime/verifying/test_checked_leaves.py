"""Leaves on the devices in whole steps, against devices that leave updates out or falsify them."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tempo_jax as tempo
from tempo_jax import errors
from tempo_jax.running.call import Runtime
from tempo_jax.schemes import Orthogonal, SignedPermutation, Tempo
from tempo_jax.sealing.array import SealedArray, is_sealed
from tests.support.interpreter import plan
from tests.support.steps import assert_close, comparable, uniform
from tests.support.verification import MOMENTUM, Alter, lying, mlp_training, one_element


@pytest.fixture(scope="module")
def watchful() -> Iterator[tempo.Enclave]:
    """An enclave of this module's own: it counts the lies it was told."""
    key = tempo.CheckpointKey.generate()
    with tempo.Enclave.launch(checkpoint_key=key) as running:
        yield running


def shielded(enclave: tempo.Enclave, step: Any, scheme: Any = None, **options: Any) -> Any:
    options = {"verify": True, "offload": "all", **options}
    return tempo.shield(step, enclave=enclave, scheme=scheme or SignedPermutation(), **options)


def on_devices(state: Any) -> int:
    leaves = jax.tree.leaves(state, is_leaf=is_sealed)
    return sum(leaf.form == "blinded" for leaf in leaves)


def falling_rate(count: Any) -> jax.Array:
    """A schedule in float64; in float32, like those of optax, two programs round differently."""
    return 0.1 - 0.009 * jnp.minimum(jnp.asarray(count, jnp.float64), 10)


@pytest.mark.parametrize("scheme", [SignedPermutation(), Tempo(), Orthogonal(5)])
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.sgd(0.1), id="sgd"),
        pytest.param(
            optax.chain(
                optax.add_decayed_weights(0.01),
                optax.sgd(falling_rate, 0.9, nesterov=True),
            ),
            id="decay, schedule and momentum",
        ),
    ],
)
def test_training_equals_the_plain_step(watchful, scheme, tx):
    # 20 steps: signs last for 16 in float64, Orthogonal's keys for 5.
    step, state, x = mlp_training(tx)
    function, plain = shielded(watchful, step, scheme), jax.jit(step)
    lies = watchful.statistics()["wrong_products"]
    expected = state
    for _ in range(20):
        state, loss = function(state, x)
        expected, expected_loss = plain(expected, x)
        assert on_devices(state) == on_devices_of(function, state, x) >= 2
        assert_close(loss, expected_loss)
    assert_close(watchful.open(state), expected)
    assert watchful.statistics()["wrong_products"] == lies


def on_devices_of(function: Any, state: Any, x: Any) -> int:
    return len(function.explain(state, x).resident)


def with_content(sealed: Any, content: Any) -> SealedArray:
    """What a device has put in the place of a leaf."""
    return SealedArray(
        *((jnp.asarray(content), sealed.handle), sealed.form, sealed.shape, sealed.dtype),
        *(sealed.weak_type, sealed.session),
    )


@dataclasses.dataclass
class Trained:
    """A state after a few steps, with the one before."""

    function: Any
    before: Any
    state: Any
    x: Any


@pytest.fixture
def trained(watchful) -> Trained:
    step, state, x = mlp_training(MOMENTUM)
    function = shielded(watchful, step, donate=False)
    for _ in range(3):
        before = state
        state, _ = function(state, x)
    return Trained(function, before, state, x)


def test_every_wrong_product_is_noticed(watchful, trained):
    program = trained.function.explain(trained.state, trained.x).plan.program
    uploads = [(i, n, c) for i, s in enumerate(program.segments) for n, c in enumerate(s.uploads)]
    assert len(uploads) == 3  # both forward, and back to the hidden layer; updates stay there
    expected = comparable(watchful.open(trained.function(trained.state, trained.x)[0]))
    for index, number, crossing in uploads:
        with lying(one_element, index, number):
            with pytest.raises(errors.IntegrityError) as caught:
                trained.function(trained.state, trained.x)
        assert f"wrong product: {crossing.source}." in str(caught.value)
        # The next honest call brings the leaf in, since its signs are spent, and goes on.
        state, _ = trained.function(trained.state, trained.x)
        assert_close(comparable(watchful.open(state)), expected)


def replaced(state: Any, position: int, content: Alter, source: Any = None) -> Any:
    """The state with one blinded leaf's content replaced by one made from `source`."""
    leaves, structure = jax.tree.flatten(state, is_leaf=is_sealed)
    given = jax.tree.leaves(source if source is not None else state, is_leaf=is_sealed)
    blinded = [i for i, leaf in enumerate(leaves) if leaf.form == "blinded"]
    chosen = blinded[position]
    leaves[chosen] = with_content(leaves[chosen], content(np.asarray(given[chosen].content)))
    return jax.tree.unflatten(structure, leaves)


LIES: dict[str, Alter] = {
    "one element": one_element,
    "scaled": lambda w: w * (1 + 1e-5),
    "zeros": np.zeros_like,
    "NaN": lambda w: np.full_like(w, np.nan),
    "rows in another order": lambda w: w[::-1],
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("position", [0, 1])
def test_a_wrong_weight_is_noticed_when_it_is_used(trained, lie, position):
    wrong = replaced(trained.state, position, LIES[lie])
    with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
        trained.function(wrong, trained.x)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_wrong_leaf_is_noticed_when_it_is_opened(watchful, trained, lie, position):
    wrong = replaced(trained.state, position, LIES[lie])
    with pytest.raises(errors.IntegrityError, match="wrong leaf: float64.*updated by dot_general"):
        watchful.open(wrong)


@pytest.mark.parametrize("position", [0, 1])
def test_a_skipped_update_is_noticed(watchful, trained, position):
    stale = replaced(trained.state, position, lambda w: w, trained.before)
    with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
        trained.function(stale, trained.x)
    with pytest.raises(errors.IntegrityError, match="wrong leaf"):
        watchful.open(stale)


def test_an_update_of_another_step_is_noticed(watchful, trained):
    # The device applies the last momentum once more than it was asked to.
    leaves = jax.tree.leaves(trained.state, is_leaf=is_sealed)
    blinded = [leaf for leaf in leaves if leaf.form == "blinded"]
    twice = replaced(trained.state, 0, lambda w: w - 0.1 * np.asarray(blinded[2].content))
    with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
        trained.function(twice, trained.x)


def test_a_wrong_momentum_is_noticed_at_the_latest_when_it_comes_back(watchful, trained):
    wrong = replaced(trained.state, 2, one_element)
    with pytest.raises(errors.IntegrityError, match="wrong product|wrong leaf"):
        state = wrong
        for _ in range(20):
            state, _ = trained.function(state, trained.x)


def test_a_leaf_is_held_to_its_checksum_when_it_is_blinded_anew(watchful):
    step, state, x = mlp_training(MOMENTUM)
    function = shielded(watchful, step, Orthogonal(1), donate=False)
    state, _ = function(state, x)
    function(state, x)
    with pytest.raises(errors.IntegrityError, match="wrong leaf: float64"):
        function(replaced(state, 1, one_element), x)


def test_what_diverges_stops_a_run_and_makes_no_liar(watchful):
    tx = tempo.cheap_update(MOMENTUM)

    def step(state: Any, x: Any) -> Any:
        params, optimizer = state

        def loss_of(params: Any) -> Any:
            # Of a root at zero the value is finite, and the gradient is not.
            return jnp.mean(jnp.sqrt(jnp.abs(jnp.tanh(x @ params["w"])) ** 2))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, optimizer = tx.update(gradients, optimizer, params)
        return (optax.apply_updates(params, changes), optimizer), tempo.reveal(loss)

    params, x = {"w": uniform(1, 12, 10)}, uniform(2, 14, 12)
    function, plain = shielded(watchful, step, donate=False), jax.jit(step)
    lies = watchful.statistics()["wrong_products"]
    expected = params, tx.init(params)
    state, _ = function(expected, x)
    expected, _ = plain(expected, x)
    assert on_devices(state) == 2
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(errors.IntegrityError, match="an operand is not finite"):
            function(state, x.at[3, 2].set(value))
    # No signs are spent: the leaves stay where they are, and training goes on.
    state, loss = function(state, x)
    expected, expected_loss = plain(expected, x)
    assert on_devices(state) == 2
    assert_close(loss, expected_loss)
    assert_close(watchful.open(state), expected)

    state, loss = function(state, x.at[3].set(0))
    assert loss == loss and np.isnan(plain(expected, x.at[3].set(0))[0][0]["w"]).any()
    with pytest.raises(errors.IntegrityError, match="a leaf is not finite.*updated by dot_general"):
        watchful.open(state)
    with pytest.raises(errors.IntegrityError, match="an operand is not finite"):
        function(state, x)
    assert watchful.statistics()["wrong_products"] == lies


def test_without_verification_the_same_lie_passes(watchful):
    """The control."""
    step, state, x = mlp_training(MOMENTUM)
    function = shielded(watchful, step, verify=False, donate=False)
    state, _ = function(state, x)
    _, honest = function(state, x)
    _, loss = function(replaced(state, 0, lambda w: 2 * w), x)
    assert abs(loss - honest) > 1e-3


def convolutional() -> tuple[Callable[..., Any], Any, Any]:
    """A step of two convolutions, one of them strided, with momentum."""
    tx = tempo.cheap_update(MOMENTUM)
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(x: Any, kernel: Any, stride: int) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
        )

    def step(state: Any, x: Any) -> Any:
        params, optimizer = state

        def loss_of(params: Any) -> Any:
            hidden = jnp.tanh(convolve(x, params["first"], 2))
            return jnp.mean(jnp.tanh(convolve(hidden, params["second"], 1)) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, optimizer = tx.update(gradients, optimizer, params)
        return (optax.apply_updates(params, changes), optimizer), tempo.reveal(loss)

    params = {"first": uniform(1, 3, 3, 4, 6), "second": uniform(2, 3, 3, 6, 5)}
    return step, (params, tx.init(params)), uniform(3, 3, 8, 8, 4)


@pytest.mark.parametrize("scheme", [SignedPermutation(), Tempo(), Orthogonal(5)])
def test_kernels_of_convolutions_are_followed(watchful, scheme):
    step, state, x = convolutional()
    function, expected = shielded(watchful, step, scheme), state
    for _ in range(18):
        state, _ = function(state, x)
        expected, _ = jax.jit(step)(expected, x)
    assert on_devices(state) == 4
    assert_close(watchful.open(state), expected)


def test_lies_about_kernels_are_noticed(watchful):
    step, state, x = convolutional()
    function = shielded(watchful, step, donate=False)
    before, _ = function(state, x)
    state, _ = function(before, x)
    program = function.explain(state, x).plan.program
    lied = 0
    for index, segment in enumerate(program.segments):
        for number in range(len(segment.uploads)):
            lied += 1
            with lying(one_element, index, number):
                with pytest.raises(errors.IntegrityError, match="wrong product: conv_general_dila"):
                    function(state, x)
    assert lied == 3
    for position in range(4):
        for source in (None, before):
            alter = one_element if source is None else lambda w: w
            with pytest.raises(errors.IntegrityError, match="wrong leaf: float64.*conv_general_d"):
                watchful.open(replaced(state, position, alter, source))


def test_grouped_kernels_stay_inside():
    def step(kernel: Any, x: Any) -> Any:
        def loss_of(kernel: Any) -> Any:
            numbers = ("NHWC", "HWIO", "NHWC")
            out = jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), "SAME"), dimension_numbers=numbers, feature_group_count=2
            )
            return jnp.mean(jnp.tanh(out) ** 2)

        tx = tempo.cheap_update(optax.sgd(0.1))
        gradient = jax.grad(loss_of)(kernel)
        return optax.apply_updates(kernel, tx.update(gradient, tx.init(kernel), kernel)[0])

    kernel, x = uniform(1, 3, 3, 4, 6), uniform(2, 2, 5, 5, 8)
    made = plan(step, kernel, x, stateful=True, scheme=SignedPermutation(), verify=True).plan
    assert not made.placement.resident
    assert "grouped convolution" in made.placement.reasons[0]


def test_a_weight_that_is_used_twice(watchful):
    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(w: Any, x: Any) -> Any:
        gradient = jax.grad(lambda w: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2))(w)
        return optax.apply_updates(w, tx.update(gradient, tx.init(w), w)[0])

    state = expected = uniform(1, 9, 9)
    x = uniform(2, 7, 9)
    function = shielded(watchful, step)
    for _ in range(4):
        state, expected = function(state, x), jax.jit(step)(expected, x)
    # Inside with and without checks: its gradient is a sum that the enclave takes.
    plain = shielded(watchful, step, verify=False)(uniform(1, 9, 9), x)
    assert on_devices(state) == on_devices(plain) == 0
    assert_close(watchful.open(state), expected)


def test_a_restored_leaf_is_followed_again(watchful):
    step, state, x = mlp_training(MOMENTUM)
    function = shielded(watchful, step)
    for _ in range(2):
        state, _ = function(state, x)
    restored = watchful.restore(watchful.checkpoint(state), like=state)
    assert on_devices(restored) == 0
    expected = watchful.open(state)
    for _ in range(2):
        restored, _ = function(restored, x)
        expected, _ = jax.jit(step)(expected, x)
    assert on_devices(restored) == 4
    assert_close(watchful.open(restored), expected)


def test_a_wrong_leaf_is_not_saved(watchful, trained):
    with pytest.raises(errors.IntegrityError, match="wrong leaf"):
        watchful.checkpoint(replaced(trained.state, 3, one_element))


def test_float32_over_several_lives_of_the_signs(watchful):
    step, state, x = mlp_training(MOMENTUM)
    state, x = jax.tree.map(lambda v: v.astype(jnp.float32), (state, x))
    function, expected = shielded(watchful, step), state
    for _ in range(20):
        state, _ = function(state, x)
        expected, _ = jax.jit(step)(expected, x)
    assert on_devices(state) == 4
    assert_close(watchful.open(state), expected, 1e-4)


def test_evaluation_uses_checked_leaves(watchful, trained):
    def predict(params: Any, x: Any) -> Any:
        return tempo.reveal(jnp.tanh(x @ params["first"]) @ params["second"])

    evaluate = shielded(watchful, predict, donate=False)
    params = trained.state[0]
    expected = predict(watchful.open(params), trained.x)
    assert_close(evaluate(params, trained.x), expected)
    wrong = replaced(trained.state, 0, one_element)[0]
    with pytest.raises(errors.IntegrityError, match="wrong product|wrong leaf"):
        evaluate(wrong, trained.x)


def test_checked_leaves_inside_jit(watchful):
    step, state, x = mlp_training(MOMENTUM)
    function = shielded(watchful, step)
    expected = state
    state, x = watchful.seal((state, x))
    state, _ = function(state, x)
    compiled = jax.jit(function)
    for _ in range(18):
        state, _ = compiled(state, x)
    for _ in range(19):
        expected, _ = jax.jit(step)(expected, watchful.open(x))
    assert_close(watchful.open(state), expected)


def test_a_wrong_product_spends_the_signs_in_runs_that_are_open(watchful, trained):
    step, *_ = mlp_training(MOMENTUM)
    function, arguments = trained.function, (trained.state, trained.x)
    liar = shielded(watchful, step, donate=False)
    expected = comparable(watchful.open(liar(*arguments)[0]))
    waiting = function._runtime(function._program(function._signature(arguments, {})))
    visit, begun, lied = Runtime._bring, threading.Event(), threading.Event()

    def intercepted(self: Any, run: Any, number: int, index: int, uploads: Any) -> Any:
        if self is not waiting:
            uploads = [one_element(np.array(x)) for x in uploads]
        elif index == 0:
            begun.set()
            assert lied.wait(60)
        return visit(self, run, number, index, uploads)

    lies = watchful.statistics()["wrong_products"]
    with pytest.MonkeyPatch.context() as patched, concurrent.futures.ThreadPoolExecutor() as pool:
        patched.setattr(Runtime, "_bring", intercepted)
        honest = pool.submit(function, *arguments)
        try:
            assert begun.wait(60)
            with pytest.raises(errors.IntegrityError, match="wrong product: dot_general"):
                liar(*arguments)
        finally:
            lied.set()
        with pytest.raises(errors.EnclaveError, match="came back before: dot_general.* Call again"):
            honest.result(60)
    # What was not compared is no lie; the next call brings the leaf in and goes on.
    assert watchful.statistics()["wrong_products"] == lies + 1
    assert_close(comparable(watchful.open(function(*arguments)[0])), expected)
