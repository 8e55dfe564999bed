"""What a program may say of the products to be checked, and what the planner makes of `verify`."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.descriptions import RESOLUTION, DotGeneral, decode_product
from enclave_runtime.protocol.program import Program, ProgramError
from enclave_runtime.verifying.follower import check_program
from tempo_jax.jaxprs.products import description
from tempo_jax.planning.plan import offloaded
from tempo_jax.schemes import Mixing, Orthogonal, SignedPermutation, Tempo
from tests.support.interpreter import plan
from tests.support.steps import shield_all, uniform
from tests.support.verification import CASES, ERROR, FORWARD, V, W, X, chain, convolution, planned

# What a program may say


@pytest.fixture
def fields() -> Any:
    """A description that verifies, as it crosses."""
    program = planned(chain, X, W, V).program
    named = tuple(dataclasses.replace(s, executable="0" * 64) for s in program.segments)
    program = dataclasses.replace(program, segments=named)
    assert Program.decode(json.loads(json.dumps(program.encode()))) == program
    return json.loads(json.dumps(program.encode()))


def first_upload(fields: Any) -> Any:
    return next(c for s in fields["segments"] for c in s["uploads"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: first_upload(f).update(product=None), "not a product that can be checked"),
        (lambda f: first_upload(f).update(operands=None), "not a product that can be checked"),
        (lambda f: first_upload(f).update(source="x" * 1001), "source is too long"),
        (lambda f: first_upload(f).update(source=3), "source is too long"),
        (
            lambda f: first_upload(f).update(layout={"classes": [None] * 2, "parities": [0, 0]}),
            "carries no key",
        ),
        (lambda f: f.update(verify=1), "verify is not a flag"),
        (lambda f: f["outputs"][0].update(place="device"), "stays where nothing checks it"),
        (lambda f: f["inputs"][0].update(place="device"), "."),
    ],
)
def test_program_that_cannot_be_verified(fields, change, message):
    change(fields)
    with pytest.raises(ProgramError, match=message):
        Program.decode(fields)


def test_narrow_results_are_refused(fields):
    for part in ("array", "blinded"):
        first_upload(fields)[part]["dtype"] = "bfloat16"
    with pytest.raises(ProgramError, match="too few digits"):
        Program.decode(fields)


@pytest.mark.parametrize("name", CASES)
def test_products_survive_encoding(name):
    product = CASES[name][0]
    assert decode_product(json.loads(json.dumps(dataclasses.asdict(product)))) == product


@pytest.mark.parametrize(
    "change",
    [
        lambda d, c: [],
        lambda d, c: {**d, "contract": [[1], [0], [2]]},
        lambda d, c: {**d, "contract": [[-1], [0]]},
        lambda d, c: {**d, "contract": [[True], [0]]},
        lambda d, c: {**d, "batch": [[32], [0]]},
        lambda d, c: {**d, "batch": [[0] * 40, [0]]},
        lambda d, c: {**d, "batch": None},
        lambda d, c: {**c, "strides": [0, 1]},
        lambda d, c: {**c, "strides": [1.5, 1]},
        lambda d, c: {**c, "padding": [[1, 1], [1, 1 << 40]]},
        lambda d, c: {**c, "padding": [1, 1]},
        lambda d, c: {**c, "lhs_dilation": [1] * 33},
        lambda d, c: {**c, "feature_groups": 0},
        lambda d, c: {**c, "batch_groups": None},
        lambda d, c: {**c, "lhs": [0]},
        lambda d, c: {**c, "rhs": [0, 1, 2]},
        lambda d, c: {**c, "out": [0, 1, 2, 2]},
    ],
)
def test_malformed_products_are_refused(change):
    dot = json.loads(json.dumps(dataclasses.asdict(FORWARD)))
    conv = json.loads(json.dumps(dataclasses.asdict(convolution())))
    with pytest.raises(ProgramError):
        decode_product(change(dot, conv))


@pytest.mark.parametrize(
    "product",
    [
        DotGeneral(((0,), (0,)), ((), ())),
        DotGeneral(((5,), (0,)), ((), ())),
        DotGeneral(((1,), (0,)), ((0,), (0,))),
        DotGeneral(((), ()), ((), ())),
        convolution(),
    ],
)
def test_products_that_do_not_fit_are_refused(product):
    program = planned(lambda x, w: jnp.tanh(x @ w), X, W).program
    segments = tuple(
        dataclasses.replace(
            s, uploads=tuple(dataclasses.replace(c, product=product) for c in s.uploads)
        )
        for s in program.segments
    )
    with pytest.raises(ProgramError, match="does not fit|result's type"):
        check_program(dataclasses.replace(program, segments=segments))


# What the planner makes of it


@pytest.mark.parametrize("scheme", [SignedPermutation(), Orthogonal(4), Tempo(), Mixing()])
def test_hosts_do_nothing_but_products_of_what_they_were_sent(scheme):
    size = 128 if isinstance(scheme, Mixing) else 16
    x, w, v = (uniform(i, size, size) for i in range(3))

    def step(state, x):
        w, v = state
        gradients = jax.grad(lambda s: jnp.sum(jnp.tanh(((x @ s[0]).T @ s[1]).T @ x) @ x))((w, v))
        tx = tempo.cheap_update(optax.sgd(0.1))
        return optax.apply_updates(state, tx.update(gradients, tx.init(state), state)[0]), x @ w

    request = plan(step, (w, v), x, stateful=False, scheme=scheme, verify=True)
    made = request.plan
    assert made.cut.host and not made.placement.resident
    sent = {v for s in made.cut.segments for v in s.downloads}
    for equation in made.cut.host:
        assert description(equation.eqn) and set(equation.eqn.invars) <= sent
    uploads = [c for s in made.program.segments for c in s.uploads]
    assert len(uploads) == len(made.cut.host) == len(offloaded(made))
    assert all(c.product and c.operands for c in uploads)
    assert all(port.place == "enclave" for port in made.program.outputs)
    # With a carried state, what stays there is followed; whatever comes back is a product.
    made = plan(step, (w, v), x, stateful=True, scheme=scheme, verify=True).plan
    assert all(c.product and c.operands for s in made.program.segments for c in s.uploads)
    followed = {p.value for p in made.program.inputs if p.place == "device"}
    followed |= {u.value for u in made.program.updates}
    kept = {p.value for p in made.program.outputs if p.place == "device"}
    assert kept <= followed and bool(kept) == bool(made.placement.resident)


def test_devices_are_asked_for_every_digit():
    for dtype, precision in (("float32", "HIGHEST"), ("bfloat16", None)):
        made = planned(lambda x, w: x @ w, X.astype(dtype), W.astype(dtype))
        ((_, eqn),) = offloaded(made)
        assert eqn.params["preferred_element_type"] == jnp.float32
        asked = eqn.params["precision"]
        assert (asked and {p.name for p in asked}) == (precision and {precision})
        assert made.jaxpr.outvars[0].aval.dtype == dtype


def test_checking_counts_when_products_are_placed(enclave):
    # Worth sending out, but not worth sending out and checking.
    x, w = jnp.zeros((2048, 352), jnp.float32), jnp.zeros((352, 352), jnp.float32)
    for verify, count in ((False, 1), (True, 0)):
        shielded = tempo.shield(
            lambda x, w: jnp.tanh(x @ w),
            enclave=enclave,
            scheme=SignedPermutation(),
            verify=verify,
        )
        assert len(offloaded(shielded.explain(x, w).plan)) == count


def test_explain_says_what_is_checked(enclave):
    state = {"w": uniform(1, 40, 30, dtype=jnp.float32)}
    x = uniform(2, 50, 40, dtype=jnp.float32)
    tx = tempo.cheap_update(optax.sgd(0.1))

    def step(state, x):
        gradient = jax.grad(lambda s: jnp.sum(jnp.tanh(x @ s["w"])))(state)
        return optax.apply_updates(state, tx.update(gradient, tx.init(state), state)[0])

    report = shield_all(step, enclave=enclave, verify=True).explain(state, x)
    # The gradient of the weight never comes back: its update on the devices is followed.
    assert len(report.checked) == 1 and "test_verified_programs" in report.checked[0][0]
    assert 0 < report.checked[0][1] < ERROR
    assert report.bytes_kept == 4 * (50 * 40 + 50 * 30)
    text = str(report)
    assert "verified: each of the 1 products" in text and "2^-16" in text
    assert "of its row's RMS" in text and "and by more than 0.0002 of itself" in text
    assert list(report.resident) == ["state['w']"] and not report.fallbacks
    assert "held to a secret checksum" in text
    assert report.checksum_runs == 16 and report.checksum_bytes == 8 * 40 * 17
    inside = shield_all(step, enclave=enclave, verify=True, donate=False)
    report = inside.explain(jax.tree.map(lambda v: v.astype(jnp.bfloat16), state), x)
    assert not report.resident and "16-bit formats round more" in str(report)
    gradient = shield_all(lambda x, w: jnp.tanh(x @ w), enclave=enclave, verify=True)
    report = gradient.explain(x, state["w"])
    assert all(0 < least <= RESOLUTION for _, least in report.checked)
    assert report.bytes_kept == 4 * (50 * 40 + 40 * 30) and not report.checksum_runs
    report = shield_all(step, enclave=enclave).explain(state, x)
    assert report.resident and not report.checked and report.bytes_kept == 0
    assert "not verified: a device that returns a wrong product is not noticed" in str(report)
    inside = tempo.shield(step, enclave=enclave, placement="enclave", verify=True)
    assert "verified: nothing comes back" in str(inside.explain(state, x))
