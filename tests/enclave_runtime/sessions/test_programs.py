"""Programs are kept by number, bounded, and freed when the client says so."""

import logging
from typing import Any

import pytest

from enclave_runtime.protocol.tags import ArgumentRule, Rules
from enclave_runtime.sessions import programs
from enclave_runtime.sessions.programs import Programs, Provisioned, UnknownProgramError


def provisioned(digest: str, rules: Rules = Rules("f", ())) -> Provisioned:  # noqa: B008
    """A program of which only the digest and the rules matter."""
    nothing: Any = None
    return Provisioned(nothing, rules, digest, nothing, {}, nothing)


def test_of_equal_programs_the_latest_is_found():
    kept = Programs()
    first, second = kept.keep(provisioned("a")), kept.keep(provisioned("a"))
    other = kept.keep(provisioned("b"))
    assert (kept.find("a"), kept.find("b")) == (second, other)
    kept.use(first)
    assert kept.find("a") == second
    kept.release(second)
    assert kept.find("a") == first
    with pytest.raises(UnknownProgramError, match="provisioned no such program"):
        kept.find("c")


def test_rules_that_refuse_something_take_the_place_of_earlier_ones():
    # The host may have kept the number under which it was allowed more.
    kept = Programs()
    wide, narrow = (
        Rules("f", (), (ArgumentRule("x", (0,), None, runs, carried=False),)) for runs in (None, 1)
    )
    number = kept.keep(provisioned("a", wide))
    other = kept.keep(provisioned("b", wide))
    assert kept.keep(provisioned("a", narrow)) == number == kept.find("a")
    assert kept.use(number).rules == narrow and kept.use(other).rules == wide and len(kept) == 2


def test_a_released_number_names_nothing_ever_after():
    kept = Programs()
    number = kept.keep(provisioned("a"))
    kept.release(number)
    kept.release(number)  # a second time does nothing
    assert len(kept) == 0 and kept.keep(provisioned("b")) != number
    for wrong in (number, -1):
        with pytest.raises(UnknownProgramError, match="or it was freed"):
            kept.use(wrong)


def test_the_one_unused_for_the_longest_goes_with_a_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    kept = Programs()
    first, second = kept.keep(provisioned("a")), kept.keep(provisioned("b"))
    kept.use(first)
    with caplog.at_level(logging.WARNING, "enclave_runtime"):
        third = kept.keep(provisioned("c"))
    assert caplog.messages == [f"freed program {second}, unused for the longest: 2 are kept"]
    assert [kept.use(n).digest for n in (first, third)] == ["a", "c"]
    with pytest.raises(UnknownProgramError, match="keeps the 2 that were used last"):
        kept.use(second)
