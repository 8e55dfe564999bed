"""Counts of runs: what is begun, shown and committed on one origin, in any order."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave_runtime.protocol.tags import NOWHERE, ArgumentRule, Rules, Seal, place_of
from enclave_runtime.sessions import admission
from enclave_runtime.sessions.admission import Admission, Claim, Origin, RefusedInputError, Tag

STATE, BATCH = (place_of(name) for name in ("state", "batch"))


def rules(runs: int | None = 1, retries: int = 2, function: str = "step") -> Rules:
    made = f"{function}.state"
    return Rules(
        function,
        (made,),
        (
            ArgumentRule("state", (0,), (("state", made),), 1, carried=True),
            ArgumentRule("batch", (1,), (("batch",),), runs, carried=False),
        ),
        retries,
    )


def batch(number: int) -> Seal:
    return Seal(BATCH, number.to_bytes(16, "big"))


FIRST = Seal(STATE, b"s" * 16)


def test_state_goes_on_from_run_to_run_and_its_generation_counts():
    counts = Admission()
    state: Any = FIRST
    for number in range(4):
        (state,) = counts.admit(rules(), "p", (state, batch(number))).commit()
        assert state.generation == number + 1 and state.place == place_of("step.state")


def test_other_program_with_the_same_inputs_is_another_run():
    # It would show something else of the same state.
    counts = Admission()
    counts.admit(rules(), "p", (FIRST, batch(1))).show()
    with pytest.raises(RefusedInputError, match="showed its results and was not committed"):
        counts.admit(rules(), "another", (FIRST, batch(1)))
    counts.admit(rules(), "p", (FIRST, batch(1))).commit()


def test_functions_share_a_states_count_and_have_their_own_of_a_batch():
    counts = Admission()
    (state,) = counts.admit(rules(), "p", (FIRST, batch(1))).commit()
    other = rules(function="tune")
    with pytest.raises(RefusedInputError, match="`state` of `tune`: a run was committed"):
        counts.admit(other, "q", (FIRST, batch(1)))
    counts.admit(other, "q", (Seal(STATE, b"t" * 16), batch(1))).commit()
    with pytest.raises(RefusedInputError, match="`state` of `tune` takes here"):
        counts.admit(other, "q", (state, batch(2)))


def test_repeat_that_was_committed_cannot_be_committed_again():
    counts = Admission()
    first, second = (counts.admit(rules(), "p", (FIRST, batch(1))) for _ in range(2))
    first.show()
    second.show()
    first.commit()
    with pytest.raises(RefusedInputError, match="a run was committed on this value"):
        second.commit()


def test_what_is_public_belongs_to_a_runs_inputs():
    counts = Admission()
    allowed = Rules(
        "step",
        (),
        (
            ArgumentRule("state", (0,), (("state",),), 1, carried=True),
            ArgumentRule("rate", (1,), None, None, carried=False),
        ),
        8,
    )
    counts.admit(allowed, "p", (FIRST, b"r" * 32)).show()
    with pytest.raises(RefusedInputError, match="showed its results"):
        counts.admit(allowed, "p", (FIRST, b"q" * 32))
    counts.admit(allowed, "p", (FIRST, b"r" * 32)).commit()


def test_refused_run_counts_for_nothing():
    counts = Admission()
    counts.admit(rules(), "p", (FIRST, batch(1))).commit()
    other = Seal(STATE, b"t" * 16)
    for _ in range(9):
        with pytest.raises(RefusedInputError, match="`batch` of `step`: 1 of the 1 runs"):
            counts.admit(rules(), "p", (other, batch(1)))
    counts.admit(rules(), "p", (other, batch(2))).commit()


def test_no_count_is_forgotten(monkeypatch):
    monkeypatch.setattr(admission, "MAX_COUNTED_SEALS", 2)
    counts = Admission()
    (state,) = counts.admit(rules(), "p", (FIRST, batch(1))).commit()
    with pytest.raises(
        RefusedInputError, match="counts the uses of 2 sealed values: start another"
    ):
        counts.admit(rules(), "p", (state, batch(2)))


def test_nothing_is_remembered_where_nothing_is_counted():
    counts = Admission()
    free = Rules("f", (), (ArgumentRule("batch", (0,), (("batch",),), None, carried=False),))
    for number in range(9):
        counts.admit(free, "p", (batch(number),)).commit()
        counts.admit(Rules("f", ()), "p", (batch(number),)).commit()
    assert not counts._sealed


def test_untagged_values_of_one_seal_are_no_argument():
    counts = Admission()
    with pytest.raises(RefusedInputError, match="and this one has no tag"):
        counts.admit(rules(), "p", (Seal(NOWHERE, bytes(16)), batch(1)))
    with pytest.raises(RefusedInputError, match="is tagged otherwise"):
        counts.admit(rules(), "p", (Tag(BATCH, Origin.new(), 3), batch(1)))


@given(
    deeds=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("asc")), max_size=30),
    runs=st.integers(1, 3),
    retries=st.integers(0, 3),
)
def test_host_gets_no_more_of_a_batch_than_it_is_allowed(deeds, runs, retries):
    """Whatever it begins, has shown, aborts and commits: a model that counts by itself."""
    counts, begun, shown, committed = Admission(), 0, set(), 0
    for state, deed in deeds:
        inputs = (Seal(STATE, bytes([state]) * 16), batch(1))
        try:
            claim: Claim = counts.admit(rules(runs, retries), "p", inputs)
            begun += 1
            if deed == "s":
                claim.show()
                shown.add(state)
            if deed == "c":
                claim.commit()
                shown.add(state)
                committed += 1
        except RefusedInputError:
            continue
    assert begun <= runs + retries
    assert len(shown) <= runs and committed <= runs
