"""What a program may say of leaves that are followed, and what the planner lets be followed."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from enclave_runtime.protocol import program
from enclave_runtime.protocol.program import Program, ProgramError
from enclave_runtime.verifying.follower import check_program
from tempo_jax.schemes import Orthogonal, SignedPermutation, Tempo
from tests.support.interpreter import plan
from tests.support.verification import mlp_training, planned_training


@pytest.fixture
def fields() -> Any:
    """A description that follows leaves, as it crosses."""
    program = planned_training(SignedPermutation()).program
    named = tuple(dataclasses.replace(s, executable="0" * 64) for s in program.segments)
    program = dataclasses.replace(program, segments=named)
    decoded = json.loads(json.dumps(program.encode()))
    assert Program.decode(decoded) == program
    check_program(program)
    return json.loads(json.dumps(program.encode()))


def first(fields: Any, kind: str) -> Any:
    return next(u for u in fields["updates"] if u["kind"] == kind)


def leaf_port(fields: Any, ports: str = "inputs") -> Any:
    return next(p for p in fields[ports] if p["place"] == "device")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: first(f, "add").update(kind="max"), "unknown kind"),
        (lambda f: first(f, "add").update(operands=[1]), "another number of operands"),
        (lambda f: first(f, "add").update(operands=[1 << 20] * 2), "cannot be followed"),
        (lambda f: first(f, "add").update(shape=[2, 2]), "operands' shape"),
        (lambda f: first(f, "add").update(dtype="bfloat16"), "too few digits"),
        (lambda f: first(f, "add").update(product={}), "do not agree"),
        (lambda f: first(f, "product").update(product=None), "do not agree"),
        (lambda f: first(f, "product").update(operands=[0, 0]), "what was not sent"),
        (lambda f: first(f, "product").update(source="x" * 1001), "source is too long"),
        (lambda f: first(f, "scale").update(factor=float("nan")), "not finite"),
        (lambda f: first(f, "scale").update(factor="2"), "not a number"),
        (
            lambda f: first(f, "scale").update(
                factor=None, operands=[first(f, "scale")["operands"][0], 1 << 20]
            ),
            "does not send",
        ),
        (lambda f: first(f, "scale").update(kind="divide", factor=0.0), "divides by zero"),
        (lambda f: first(f, "transpose").update(axes=[0, 0]), "are not an order"),
        (lambda f: first(f, "transpose").update(kind="reverse", axes=[0, 5]), "not there"),
        (lambda f: f["updates"].reverse(), "cannot be followed"),
        (lambda f: f["updates"].append(f["updates"][-1]), "makes what is there"),
        (lambda f: f.update(updates=None), "updates"),
        (lambda f: leaf_port(f).update(projections=[]), "nothing checks it"),
        (lambda f: leaf_port(f).update(projections=[[0]]), "lacks a projection"),
        (lambda f: leaf_port(f).update(projections=[[0, 0]]), "names an axis twice"),
        (lambda f: leaf_port(f).update(projections=[[]]), "has no axis"),
        (lambda f: leaf_port(f).update(projections=[[0], [0]]), "a projection twice"),
        (lambda f: leaf_port(f).update(projections=[[2]]), "an axis"),
        (lambda f: leaf_port(f).update(projections=[[0]] * 9), "too many projections"),
        (lambda f: leaf_port(f, "outputs").update(value=1 << 20), "is not followed"),
        (lambda f: leaf_port(f, "outputs").update(projections=[[0, 1]]), "crosses a product"),
        (lambda f: f.update(verify=False), "does not verify"),
    ],
)
def test_malformed_updates_are_refused(fields, change, message):
    change(fields)
    with pytest.raises(ProgramError, match=message):
        Program.decode(fields)


def test_too_many_updates_are_refused(fields, monkeypatch):
    monkeypatch.setattr(program, "MAX_UPDATES", len(fields["updates"]))
    Program.decode(fields)
    monkeypatch.setattr(program, "MAX_UPDATES", len(fields["updates"]) - 1)
    with pytest.raises(ProgramError, match="too many updates"):
        Program.decode(fields)


def test_products_that_do_not_fit_are_refused(fields):
    first(fields, "product")["product"]["contract"] = [[1], [1]]
    with pytest.raises(ProgramError, match="does not fit|result's type"):
        check_program(Program.decode(fields))


@pytest.mark.parametrize("scheme", [SignedPermutation(), Orthogonal(4), Tempo()])
def test_leaves_stay_on_the_devices(scheme):
    made = planned_training(scheme)
    matrices = {i for i, v in enumerate(made.jaxpr.invars[:-1]) if v.aval.ndim == 2}
    assert made.placement.resident == matrices and len(matrices) == 4
    sent = {v for s in made.cut.segments for v in s.downloads}
    products = {u.source for u in made.program.updates if u.product}
    assert len(products) == 2 and all("dot_general" in s for s in products)
    assert sent and made.program.needs()


@pytest.mark.parametrize(
    ("tx", "reason"),
    [
        (optax.adam(0.1), "integer_pow: verify=True follows linear updates"),
        (optax.chain(optax.clip(1.0), optax.sgd(0.1)), "verify=True follows linear updates"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "square: verify=True"),
    ],
)
def test_what_cannot_be_followed_stays_inside(tx, reason):
    made = planned_training(SignedPermutation(), tx)
    assert not made.placement.resident and not made.program.updates
    first, second = made.placement.reasons[1], made.placement.reasons[2]
    assert reason in first and reason in second


def test_narrow_leaves_stay_inside():
    step, state, x = mlp_training(optax.sgd(0.1))
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (state, x))
    made = plan(step, *narrow, stateful=True, scheme=SignedPermutation(), verify=True).plan
    assert not made.placement.resident
    assert "16-bit formats round more" in made.placement.reasons[1]
