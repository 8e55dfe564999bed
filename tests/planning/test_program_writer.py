"""The enclave's part, written down: numbers, places, room in shared memory, and ends of lives."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import tempo_jax as tempo
from enclave_runtime.protocol.memory import input_bytes
from enclave_runtime.protocol.program import ALIGNMENT, DEVICE, ENCLAVE, Program, aligned
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import Plan
from tempo_jax.schemes import Mixing, Orthogonal, Tempo
from tests.support.interpreter import plan
from tests.support.programs import as_it_crosses, with_executables
from tests.support.steps import SIGNED_PERMUTATION, training, uniform


def step() -> Any:
    """A step of a net with two layers, momentum and a bias that lives inside."""

    def loss(p: Any, rest: Any, x: jax.Array) -> Any:
        z = jnp.exp(x @ p["first"] + p["bias"]) @ p["second"]
        return jnp.mean(z**2), (rest, z)

    p = {"first": uniform(1, 64, 70), "bias": uniform(2, 70), "second": uniform(3, 70, 66)}
    optimizer = tempo.cheap_update(optax.sgd(0.1, momentum=0.9))
    return training(loss, p, [uniform(4, 128, 64)], optimizer)


CASES: dict[str, dict[str, Any]] = {
    "signed permutations": {"scheme": SIGNED_PERMUTATION},
    "Tempo": {"scheme": Tempo()},
    "orthogonal": {"scheme": Orthogonal()},
    "mixing": {"scheme": Mixing(decoy_rows=32, mask_energy=0)},
    "checked": {"scheme": SIGNED_PERMUTATION, "verify": True},
}


@pytest.fixture(scope="module", params=CASES)
def planned(request) -> Plan:
    case = step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostModel, "may_go_ahead", lambda *_: True)
        given = case.state, case.batches[0]
        return plan(case.step, *given, stateful=True, **CASES[request.param]).plan


@pytest.fixture
def program(planned) -> Program:
    return planned.program


def test_enclave_takes_what_was_written(program):
    named = with_executables(program)
    assert Program.decode(as_it_crosses(named)) == named


def test_values_are_numbered_as_they_are_first_named(program):
    ports = [p.value for p in (*program.constants, *program.inputs, *program.outputs)]
    assert list(dict.fromkeys(ports)) == list(range(len(set(ports))))
    later = {v for s in program.segments for v in (*s.inputs, *s.outputs)}
    later |= {c.value for s in program.segments for c in (*s.uploads, *s.downloads)}
    assert max(later) >= len(set(ports)) and not any(v < 0 for v in later)


def test_ports_say_where_values_are(planned, program):
    resident = planned.placement.resident
    assert [p.place for p in program.inputs] == [
        DEVICE if i in resident else ENCLAVE for i in range(len(program.inputs))
    ]
    for port in (*program.inputs, *program.outputs):
        assert port.layout.keyed == (port.place == DEVICE)
    assert len(program.outputs) == len(planned.sealed)


def test_crossings_have_room_of_their_own(program):
    downloads_end = 0
    for index, segment in enumerate(program.segments):
        for crossings in (segment.downloads, segment.uploads):
            end = None
            for c in crossings:
                assert c.offset % ALIGNMENT == 0 and (end is None or c.offset == end)
                end = c.offset + aligned(c.blinded.nbytes)
                assert end <= program.arena_bytes
            if crossings is segment.downloads and index not in program.ahead:
                downloads_end = max(downloads_end, end or 0)
    # A worker may bring uploads while another still copies downloads of the segment before.
    starts = [c.offset for s in program.segments for c in s.uploads]
    assert starts and min(starts) >= downloads_end
    # What is sent ahead is fetched with the next downloads, while more may be on its way.
    places = [[c.offset for c in program.segments[i].downloads] for i in program.ahead]
    ends = [c.offset + c.blinded.nbytes for s in program.segments for c in s.uploads]
    assert all(min(offsets) >= max(downloads_end, *ends) for offsets in places)
    assert all(a[0] != b[0] for a, b in zip(places, places[1:], strict=False))
    arriving = (*program.constants, *program.inputs)
    assert sum(input_bytes(port.array) for port in arriving) <= program.arena_bytes
    assert program.arena_bytes % ALIGNMENT == 0


def test_values_die_once_where_they_are_last_named(program):
    last: dict[int, int] = {}
    for index, s in enumerate(program.segments):
        crossing = (c.value for c in (*s.uploads, *s.downloads))
        last.update(dict.fromkeys((*s.inputs, *s.outputs, *crossing), index))
    kept = {port.value for port in program.outputs}
    dead = [(value, index) for index, s in enumerate(program.segments) for value in s.dead]
    assert sorted(dead) == sorted((v, i) for v, i in last.items() if v not in kept)


def test_crossings_are_blinded_as_the_plan_says(planned, program):
    crossed = {}
    for segment, described in zip(planned.cut.segments, program.segments, strict=True):
        for variables, crossings in (
            (segment.uploads, described.uploads),
            (segment.downloads, described.downloads),
        ):
            for v, c in zip(variables, crossings, strict=True):
                assert c.layout == planned.layout(v) and c.blinded == planned.blinded(v)
                crossed.setdefault(c.value, v)
    assert crossed


def test_products_are_described_as_far_as_the_enclave_needs_it(planned, program):
    per_product = planned.request.scheme.keys_per_product
    made = {v for e in planned.cut.host for v in e.eqn.outvars}
    for segment, described in zip(planned.cut.segments, program.segments, strict=True):
        for v, c in zip(segment.uploads, described.uploads, strict=True):
            assert (c.operands is not None) == (v in made and (per_product or program.verify))
            assert (c.product is not None) == bool(c.source) == (v in made and program.verify)
        assert not any(c.operands or c.product or c.source for c in described.downloads)


def test_names_of_code_are_left_for_the_client(program):
    assert {segment.executable for segment in program.segments} == {""}


@pytest.mark.parametrize("layers", [3, 4, 7])
def test_what_goes_ahead_takes_no_more_memory(monkeypatch, layers):
    def forward(parameters: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in parameters:
            x = jnp.tanh(x @ w)
        return x

    def size() -> int:
        parameters = [uniform(i, 64, 64) for i in range(layers)]
        made = plan(forward, parameters, uniform(9, 128, 64), scheme=Mixing()).plan.program
        assert len(made.ahead) == together * (layers - 2)  # the last stays inside
        crossings = [c for s in made.segments for c in (*s.uploads, *s.downloads)]
        return max(c.offset + c.blinded.nbytes for c in crossings)

    sizes = []
    for together in (False, True):
        monkeypatch.setattr(CostModel, "may_go_ahead", lambda *_, together=together: together)
        sizes.append(size())
    assert sizes[1] <= sizes[0]
