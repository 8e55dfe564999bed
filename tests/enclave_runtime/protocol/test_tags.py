"""Tags travel with the ciphertext and cannot be changed; rules that contradict themselves fail."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave_runtime.crypto.encryption import DecryptionError, encrypt_array
from enclave_runtime.protocol.program import ProgramError
from enclave_runtime.protocol.tags import (
    ArgumentRule,
    Rules,
    Seal,
    TagRecord,
    place_of,
    publish_array,
    published_array,
    published_bytes,
    read_published,
    seal_array,
    seal_bytes,
    unseal_array,
)

KEY = bytes(range(32))
PLAIN = np.arange(6.0).reshape(2, 3)
SEALED_AS = Seal(place_of("state['w']"), b"o" * 16)
FORM: Any = ((2, 3), np.dtype("float64"))


def test_unsealing_inverts_sealing():
    sealed = seal_array(KEY, PLAIN, "session", SEALED_AS)
    assert sealed.shape == (seal_bytes(PLAIN.nbytes),) and sealed.dtype == np.uint8
    seal, plain = unseal_array(KEY, sealed, "session", *FORM)
    assert seal == SEALED_AS
    np.testing.assert_array_equal(plain, PLAIN)


def test_layout_is_frozen():
    sealed = seal_array(KEY, PLAIN, "session", SEALED_AS).tobytes()
    place = hashlib.sha256(b"tempo_jax/place|state['w']").digest()
    assert sealed[:48] == place + b"o" * 16 and len(sealed) == 48 + 12 + 48 + 16
    record = TagRecord(place, b"o" * 16, 258)
    assert record.encode() == place + b"o" * 16 + bytes(6) + b"\1\2"
    assert TagRecord.decode(record.encode()) == record


def test_every_altered_byte_and_length_is_refused():
    sealed = seal_array(KEY, PLAIN, "session", SEALED_AS)
    for position in range(sealed.size):
        altered = sealed.copy()
        altered[position] ^= 0x20
        with pytest.raises(DecryptionError):
            unseal_array(KEY, altered, "session", *FORM)
    for length in range(sealed.size):
        with pytest.raises(DecryptionError):
            unseal_array(KEY, sealed[:length], "session", *FORM)


def test_what_has_no_tag_gets_none_by_a_head_in_front():
    # An array that a client encrypted for something else, as the constants of a program.
    other = encrypt_array(KEY, PLAIN, "session")
    forged = np.concatenate([np.frombuffer(b"".join(SEALED_AS), np.uint8), other])
    with pytest.raises(DecryptionError):
        unseal_array(KEY, forged, "session", *FORM)


def test_published_array_is_readable_and_authentic():
    published = publish_array(KEY, PLAIN, "session", SEALED_AS)
    assert published.shape == (published_bytes(PLAIN.nbytes),)
    assert published[76:].tobytes() == PLAIN.tobytes()
    np.testing.assert_array_equal(read_published(published, *FORM), PLAIN)
    seal, plain = published_array(KEY, published, "session", *FORM)
    assert seal == SEALED_AS
    np.testing.assert_array_equal(plain, PLAIN)
    for position in range(published.size):
        altered = published.copy()
        altered[position] ^= 1
        with pytest.raises(DecryptionError):
            published_array(KEY, altered, "session", *FORM)
    wrong: Any
    for wrong in (("other", *FORM), ("session", (3, 2), FORM[1]), ("session", (6,), FORM[1])):
        with pytest.raises(DecryptionError):
            published_array(KEY, published, *wrong)


def test_sealed_and_published_are_not_mistaken_for_each_other():
    empty = np.zeros((0,))
    form: Any = ((0,), empty.dtype)
    sealed, published = (make(KEY, empty, "s", SEALED_AS) for make in (seal_array, publish_array))
    with pytest.raises(DecryptionError):
        published_array(KEY, sealed, "s", *form)
    with pytest.raises(DecryptionError):
        unseal_array(KEY, published, "s", *form)


@given(first=st.text(max_size=9), second=st.text(max_size=9))
def test_places_are_equal_where_their_texts_are(first, second):
    assert (place_of(first) == place_of(second)) == (first == second)


RULES = Rules(
    "step",
    ("step.state", "step.result[1]"),
    (
        ArgumentRule("state", (0, 2), (("state",), ("state", "step.state")), 1, carried=True),
        ArgumentRule("batch", (1,), None, None, carried=False),
    ),
    8,
)


def test_reading_inverts_writing():
    for rules in (RULES, Rules("f", ("a", "b"))):
        encoded = rules.encode()
        as_json = {**encoded, "outputs": list(encoded["outputs"])}
        as_json["arguments"] = [_lists(a) for a in encoded["arguments"]]
        assert Rules.decode(as_json, 3, 2) == rules


def _lists(fields: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    texts = fields["texts"]
    texts = None if texts is None else [list(t) for t in texts]
    return {**fields, "inputs": list(fields["inputs"]), "texts": texts}


def _rule(**changes: Any) -> dict[str, Any]:
    return {**_lists(dataclasses.asdict(RULES.arguments[0])), **changes}


WRONG: dict[str, dict[str, Any]] = {
    "comes without rules": {"all": None},
    "rules have other fields": {"more": 1},
    "other outputs": {"outputs": ["a"]},
    "no text": {"function": 3},
    "too long": {"function": "x" * 8193},
    "rules is not a list": {"arguments": {}},
    "retries is out of range": {"retries": -1},
    "a rule has other fields": {"arguments": [{**_rule(), "more": 1}]},
    "input is out of range": {"arguments": [_rule(inputs=[0, 3])]},
    "cover other inputs": {"arguments": [_rule()]},
    "places for other inputs": {"arguments": [_rule(texts=[["a"]])]},
    "too many places, or none": {"arguments": [_rule(texts=[[], ["a"]])]},
    "runs is out of range": {"arguments": [_rule(runs=True)]},
    "allows no run": {"arguments": [_rule(runs=0)]},
    "carried is not a flag": {"arguments": [_rule(carried=1)]},
}


@pytest.mark.parametrize("text", WRONG)
def test_rules_that_contradict_themselves_are_refused(text):
    encoded = {**RULES.encode(), "outputs": list(RULES.outputs)}
    encoded["arguments"] = [_lists(dataclasses.asdict(a)) for a in RULES.arguments]
    changed = None if "all" in WRONG[text] else {**encoded, **WRONG[text]}
    with pytest.raises(ProgramError, match=text):
        Rules.decode(changed, 3, 2)


def test_a_sealed_array_is_longer_by_each_part_and_a_published_one_is_not():
    gibibyte = 1 << 30
    assert [seal_bytes(n) - n for n in (0, gibibyte, gibibyte + 1, 2 * gibibyte + 1)] == [
        *(76, 76, 104, 132)
    ]
    assert [published_bytes(n) - n for n in (0, gibibyte, 3 * gibibyte)] == [76, 76, 76]
