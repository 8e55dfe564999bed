"""Evidence and policy: what binds a quote to one handshake, and what a client takes."""

import base64
import builtins
import dataclasses
import datetime
import hashlib
import json
import os
import struct
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import tempo_jax as tempo
from enclave_runtime.protocol import evidence, wire
from enclave_runtime.protocol.evidence import (
    MAX_EVIDENCE,
    MAX_QUOTE,
    Evidence,
    EvidenceError,
    configuration_hash,
    decode_evidence,
    detect_platform,
    make_evidence,
    report_data,
)
from tempo_jax.attestation.policy import AttestationPolicy, Verified, verify_evidence
from tempo_jax.attestation.tcb import Collateral
from tempo_jax.errors import AttestationError, TempoError
from tests.support.toy_pki import (
    COMPONENTS,
    DEBUG_ATTRIBUTES,
    MRENCLAVE,
    MRSIGNER,
    NOW,
    PCE_SVN,
    PRODUCT_ID,
    SVN,
    Toy,
    key,
    spki,
    tcb_level,
)

PUBLIC_KEY = spki(key("channel"))
NONCE = bytes(range(32))
CONFIGURATION = configuration_hash({"protocol": 1})
BOUND = report_data(PUBLIC_KEY, NONCE, CONFIGURATION)
TOY = Toy(report_data=BOUND)
COLLATERAL = Collateral.from_json(TOY.collateral_json)
POLICY = AttestationPolicy(mrenclave=MRENCLAVE, collateral=COLLATERAL)
BY_SIGNER = AttestationPolicy(
    mrsigner=MRSIGNER, product_id=PRODUCT_ID, min_svn=SVN, collateral=COLLATERAL
)
INSECURE = AttestationPolicy(insecure_accept_no_sgx=True)


def encoded(quote: bytes) -> bytes:
    """Evidence with a quote, as an enclave under SGX makes it."""
    text = base64.b64encode(quote).decode()
    return json.dumps(
        {"format": evidence.FORMAT, "platform": "gramine-sgx", "quote": text}
    ).encode()


def verify(shown: bytes, policy: AttestationPolicy = POLICY, **changes: Any) -> Verified:
    arguments = {
        "public_key_der": PUBLIC_KEY,
        "nonce": NONCE,
        "configuration": CONFIGURATION,
        "now": NOW,
        "insecure_root_sha256": TOY.root_sha256,
        **changes,
    }
    return verify_evidence(shown, policy=policy, **arguments)


# Report data


def test_report_data_is_frozen():  # bump the protocol's version before changing it
    golden = hashlib.sha512(
        b"\0\0\0\x15tempo_jax/report data"
        + (b"\0\0\0\2" + wire.VERSION.to_bytes(2, "big"))
        + (b"\0\0\0\3key" + b"\0\0\0\x20" + NONCE + b"\0\0\0\x20" + bytes(32))
    )
    assert report_data(b"key", NONCE, bytes(32)) == golden.digest()
    assert len(golden.digest()) == evidence.REPORT_DATA_BYTES


def test_report_data_depends_on_everything(monkeypatch):
    found = {
        BOUND,
        report_data(spki(key("other")), NONCE, CONFIGURATION),
        report_data(PUBLIC_KEY, NONCE[::-1], CONFIGURATION),
        report_data(PUBLIC_KEY, NONCE, configuration_hash({"protocol": 2})),
        # A byte moved from one field to the next would be the same without the lengths.
        report_data(PUBLIC_KEY + NONCE[:1], NONCE[1:] + CONFIGURATION[:1], CONFIGURATION),
    }
    monkeypatch.setattr(wire, "VERSION", wire.VERSION + 1)
    found.add(report_data(PUBLIC_KEY, NONCE, CONFIGURATION))
    assert len(found) == 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((b"", NONCE, CONFIGURATION), "public key is empty"),
        ((PUBLIC_KEY, NONCE[1:], CONFIGURATION), "a nonce has 31 bytes, expected 32"),
        ((PUBLIC_KEY, b"", CONFIGURATION), "a nonce has 0 bytes"),
        ((PUBLIC_KEY, NONCE, CONFIGURATION + b"\0"), "configuration hash has 33 bytes"),
    ],
)
def test_report_data_of_other_lengths_is_refused(arguments, text):
    with pytest.raises(EvidenceError, match=text):
        report_data(*arguments)
    with pytest.raises(EvidenceError, match=text):
        make_evidence(*arguments)


def test_configuration_hash_is_frozen():
    assert configuration_hash({"b": True, "a": "x"}) == (
        hashlib.sha256(b'{"a":"x","b":true}').digest()
    )
    with pytest.raises(ValueError):
        configuration_hash({"a": float("nan")})  # type: ignore[dict-item]


# Making evidence


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """A stand-in for Gramine's pseudo-files."""
    monkeypatch.setattr(evidence, "_ATTESTATION_FOLDER", str(tmp_path))
    return tmp_path


def test_platform_is_told_by_the_pseudo_files(monkeypatch, folder):
    assert detect_platform() == "gramine-direct"
    (folder / "keys").mkdir()
    assert detect_platform() == "gramine-direct"
    (folder / "report").touch()
    assert detect_platform() == "gramine-sgx"
    monkeypatch.setattr(evidence, "_ATTESTATION_FOLDER", str(folder / "none"))
    assert detect_platform() == "process"


@pytest.mark.parametrize("platform", ["process", "gramine-direct"])
def test_evidence_without_sgx_says_insecure(monkeypatch, platform):
    monkeypatch.setattr(evidence, "detect_platform", lambda: platform)
    made = make_evidence(PUBLIC_KEY, NONCE, CONFIGURATION)
    assert json.loads(made)["insecure"] is True
    assert decode_evidence(made) == Evidence(platform, report_data=BOUND)
    assert decode_evidence(made).insecure


def test_evidence_with_sgx_carries_the_quote(folder):
    (folder / "report").touch()
    (folder / "quote").write_bytes(b"a quote")
    made = make_evidence(PUBLIC_KEY, NONCE, CONFIGURATION)
    assert (folder / "user_report_data").read_bytes() == BOUND
    assert decode_evidence(made) == Evidence("gramine-sgx", quote=b"a quote")
    assert not decode_evidence(made).insecure


def test_sgx_without_a_quote_does_not_fall_back(folder):
    (folder / "report").touch()
    with pytest.raises(EvidenceError, match='needs `sgx.remote_attestation = "dcap"`'):
        make_evidence(PUBLIC_KEY, NONCE, CONFIGURATION)


@pytest.mark.parametrize("size", [0, MAX_QUOTE + 1])
def test_quote_of_an_impossible_size_is_refused(folder, size):
    (folder / "report").touch()
    (folder / "quote").write_bytes(bytes(size))
    with pytest.raises(EvidenceError, match=f"a quote of {size} bytes"):
        make_evidence(PUBLIC_KEY, NONCE, CONFIGURATION)


def test_quotes_of_threads_do_not_mix(monkeypatch, folder):
    (folder / "report").touch()
    (folder / "quote").touch()
    written = folder / "user_report_data"

    def slow_open(path: Any, mode: str = "r") -> Any:
        # The device answers with a quote over what was written last.
        if os.fspath(path).endswith("quote"):
            time.sleep(0.01)
            (folder / "quote").write_bytes(written.read_bytes())
        return builtins.open(path, mode)

    monkeypatch.setattr(evidence, "open", slow_open, raising=False)
    found: dict[int, bytes] = {}

    def make(number: int) -> None:
        made = make_evidence(PUBLIC_KEY, bytes([number]) * 32, CONFIGURATION)
        found[number] = decode_evidence(made).quote

    threads = [threading.Thread(target=make, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: report_data(PUBLIC_KEY, bytes([n]) * 32, CONFIGURATION) for n in range(8)}


# Decoding evidence

PLAIN = {
    "format": evidence.FORMAT,
    "platform": "process",
    "insecure": True,
    "report_data": "00" * 64,
}
QUOTED = {"format": evidence.FORMAT, "platform": "gramine-sgx", "quote": "AAAA"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({**PLAIN, "format": "tempo_jax/evidence/2"}, "not of the format tempo_jax/evidence/1"),
        ([], "not of the format"),
        ({**PLAIN, "platform": "sgx"}, "an unknown platform"),
        ({**PLAIN, "platform": ["process"]}, "an unknown platform"),
        ({**PLAIN, "platform": None}, "an unknown platform"),
        ({**PLAIN, "platform": "gramine-sgx"}, "other fields than it should"),
        ({**PLAIN, "quote": "AAAA"}, "other fields than it should"),
        ({**PLAIN, "insecure": False}, "does not say what it is bound to"),
        ({**PLAIN, "insecure": 1}, "does not say what it is bound to"),
        ({**PLAIN, "report_data": "00" * 63}, "does not say what it is bound to"),
        ({**PLAIN, "report_data": "xx" * 64}, "report data in evidence does not decode"),
        ({**PLAIN, "report_data": 5}, "report data in evidence is not text"),
        ({**QUOTED, "insecure": True}, "other fields than it should"),
        ({**QUOTED, "platform": "process"}, "other fields than it should"),
        ({**QUOTED, "quote": "AAA"}, "a quote in evidence does not decode"),
        ({**QUOTED, "quote": "AA AA"}, "a quote in evidence does not decode"),
        ({**QUOTED, "quote": None}, "a quote in evidence is not text"),
        ({**QUOTED, "quote": ""}, "a quote of 0 bytes, expected 1 to"),
        ({**QUOTED, "quote": "A" * 4 * (MAX_QUOTE // 3 + 1)}, "a quote of 65538 bytes"),
    ],
)
def test_malformed_evidence_is_refused(fields, text):
    with pytest.raises(EvidenceError, match=text):
        decode_evidence(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "does not parse"),
        (b"\xff", "does not parse"),
        (b"[" * 100_000, "does not parse"),
        (b" " * (MAX_EVIDENCE + 1), f"evidence of {MAX_EVIDENCE + 1} bytes"),
    ],
)
def test_evidence_that_is_no_json_is_refused(content, text):
    with pytest.raises(EvidenceError, match=text):
        decode_evidence(content)
    with pytest.raises(AttestationError, match=f"evidence does not do: .*{text}"):
        verify(content)


@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_any_evidence_is_decoded_or_refused(content):
    with pytest.raises(EvidenceError):
        decode_evidence(content)


# Policies


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "name the enclave by `mrenclave`"),
        ({"collateral": COLLATERAL}, "name the enclave by `mrenclave`"),
        ({"mrenclave": MRENCLAVE}, "cannot be verified without `collateral`"),
        ({"mrenclave": MRENCLAVE[1:]}, "`mrenclave` has 32 bytes"),
        ({"mrenclave": "ab" * 31}, "`mrenclave` has 32 bytes"),
        ({"mrenclave": "xy" * 32}, "`mrenclave` has 32 bytes"),
        ({"mrenclave": 32}, "`mrenclave` has 32 bytes"),
        ({"mrsigner": b""}, "`mrsigner` has 32 bytes"),
        ({"mrsigner": MRSIGNER}, "`mrsigner` alone admits everything"),
        ({"mrsigner": MRSIGNER, "product_id": 1}, "`mrsigner` alone admits everything"),
        ({"mrsigner": MRSIGNER, "min_svn": 1}, "`mrsigner` alone admits everything"),
        ({"mrenclave": MRENCLAVE, "min_svn": 1}, "mean nothing without `mrsigner`"),
        ({"product_id": 1, "insecure_accept_no_sgx": True}, "mean nothing without `mrsigner`"),
        ({"product_id": -1}, "`product_id` is not between 0 and 65535"),
        ({"min_svn": 1 << 16}, "`min_svn` is not between 0 and 65535"),
        ({"min_svn": True}, "`min_svn` is not between 0 and 65535"),
        ({"accepted_tcb": ()}, "`accepted_tcb` takes one or more of UpToDate"),
        ({"accepted_tcb": ("Revoked",)}, "`accepted_tcb` takes one or more of UpToDate"),
        ({"accepted_tcb": ("uptodate",)}, "`accepted_tcb` takes one or more of UpToDate"),
        ({"accepted_tcb": "UpToDate"}, "`accepted_tcb` is a tuple of statuses"),
        ({"insecure_accept_no_sgx": "false"}, "`insecure_accept_no_sgx` is True or False"),
        ({"insecure_accept_no_sgx": 1}, "`insecure_accept_no_sgx` is True or False"),
        ({"mrenclave": MRENCLAVE, "collateral": "{}"}, "`collateral` is a `Collateral`"),
    ],
)
def test_policy_that_admits_anybody_is_refused(arguments, text):
    with pytest.raises(AttestationError, match=text):
        AttestationPolicy(**arguments)


def test_policy_takes_hex():
    assert AttestationPolicy(mrenclave=MRENCLAVE.hex(), collateral=COLLATERAL) == POLICY


def test_policy_is_public():
    assert tempo.AttestationPolicy is AttestationPolicy
    assert tempo.Collateral is Collateral
    assert issubclass(AttestationError, TempoError)


# Verification


@pytest.mark.parametrize("policy", [POLICY, BY_SIGNER], ids=["mrenclave", "mrsigner"])
def test_right_evidence_is_verified(policy):
    assert verify(encoded(TOY.quote), policy) == Verified(
        platform="gramine-sgx",
        insecure=False,
        mrenclave=MRENCLAVE,
        mrsigner=MRSIGNER,
        product_id=PRODUCT_ID,
        svn=SVN,
        tcb_status="UpToDate",
    )


def test_intel_root_is_the_default():
    with pytest.raises(AttestationError, match="does not end in the pinned root"):
        verify(encoded(TOY.quote), insecure_root_sha256=None)


BINDING = "made for another key, nonce, protocol version or configuration"


@pytest.mark.parametrize(
    "changes",
    [
        {"public_key_der": spki(key("other"))},
        {"nonce": NONCE[::-1]},
        {"configuration": configuration_hash({"protocol": 2})},
    ],
    ids=["key", "nonce", "configuration"],
)
def test_evidence_for_something_else_is_refused(changes):
    with pytest.raises(AttestationError, match=BINDING):
        verify(encoded(TOY.quote), **changes)
    plain = make_evidence(PUBLIC_KEY, NONCE, CONFIGURATION)
    with pytest.raises(AttestationError, match=BINDING):
        verify(plain, INSECURE, **changes)


def test_evidence_of_another_protocol_version_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "VERSION", wire.VERSION + 1)
    with pytest.raises(AttestationError, match=BINDING):
        verify(encoded(TOY.quote))


BOTH = dataclasses.replace(BY_SIGNER, mrenclave=MRENCLAVE)


@pytest.mark.parametrize(
    ("toy", "policy", "text"),
    [
        (Toy(report_data=BOUND, mrenclave=b"\1" * 32), POLICY, "MRENCLAVE is 0101.* asks for e1e1"),
        (Toy(report_data=BOUND, mrenclave=b"\1" * 32), BOTH, "MRENCLAVE is 0101"),
        (Toy(report_data=BOUND, mrsigner=b"\1" * 32), BY_SIGNER, "MRSIGNER is 0101"),
        (Toy(report_data=BOUND, mrsigner=b"\1" * 32), BOTH, "MRSIGNER is 0101"),
        (Toy(report_data=BOUND, product_id=4), BY_SIGNER, "product id is 4, the policy asks for 3"),
        (Toy(report_data=BOUND, svn=SVN - 1), BY_SIGNER, "version is 6, .* asks for at least 7"),
        (Toy(report_data=BOUND, attributes=DEBUG_ATTRIBUTES), POLICY, "runs in DEBUG mode"),
        (Toy(report_data=BOUND, attributes=DEBUG_ATTRIBUTES), BY_SIGNER, "runs in DEBUG mode"),
        (Toy(report_data=bytes(64)), POLICY, BINDING),
        (Toy(report_data=BOUND[:32] + bytes(32)), POLICY, BINDING),
    ],
)
def test_enclave_outside_the_policy_is_refused(toy, policy, text):
    with pytest.raises(AttestationError, match=text):
        verify(encoded(toy.quote), policy)


def test_newer_enclave_of_the_signer_is_accepted():
    toy = Toy(report_data=BOUND, svn=SVN + 1, mrenclave=b"\1" * 32)
    assert verify(encoded(toy.quote), BY_SIGNER).svn == SVN + 1


@pytest.mark.parametrize(
    "status", ["SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate", "Revoked"]
)
def test_platform_outside_the_policy_is_refused(status):
    toy = Toy(report_data=BOUND, levels=(tcb_level(COMPONENTS, PCE_SVN, status, "INTEL-SA-00615"),))
    collateral = Collateral.from_json(toy.collateral_json)
    policy = dataclasses.replace(POLICY, collateral=collateral)
    text = rf"TCB status is {status} \(INTEL-SA-00615\); the policy accepts UpToDate"
    with pytest.raises(AttestationError, match=text):
        verify(encoded(toy.quote), policy)
    if status != "Revoked":
        accepting = dataclasses.replace(policy, accepted_tcb=("UpToDate", status))
        verified = verify(encoded(toy.quote), accepting)
        assert (verified.tcb_status, verified.advisories) == (status, ("INTEL-SA-00615",))


def test_insecure_evidence_is_refused_unless_asked_for():
    made = make_evidence(PUBLIC_KEY, NONCE, CONFIGURATION)
    for policy in (POLICY, BY_SIGNER):
        with pytest.raises(AttestationError, match="has no SGX quote to show"):
            verify(made, policy)
    assert verify(made, INSECURE) == Verified(platform="process", insecure=True)


@pytest.mark.parametrize("policy", [POLICY, BY_SIGNER], ids=["mrenclave", "mrsigner"])
def test_policy_that_asks_for_a_quote_does_not_do_without(policy):
    # The host would only have to withhold it.
    with pytest.raises(AttestationError, match="only have to withhold the quote. Leave it out"):
        dataclasses.replace(policy, insecure_accept_no_sgx=True)
    with pytest.raises(AttestationError, match="only have to withhold the quote"):
        AttestationPolicy(collateral=policy.collateral, insecure_accept_no_sgx=True)


def test_quote_is_not_taken_on_trust():
    with pytest.raises(AttestationError, match="says neither which enclave it takes"):
        verify(encoded(TOY.quote), INSECURE)


def test_time_without_a_zone_is_refused():
    with pytest.raises(AttestationError, match="`now` has no time zone"):
        verify(encoded(TOY.quote), now=datetime.datetime(2026, 3, 1))


def test_flipped_bit_anywhere_in_the_report_is_refused():
    for offset in range(48, 432):
        quote = bytearray(TOY.quote)
        quote[offset] ^= 1 << offset % 8
        with pytest.raises(AttestationError, match="is not signed by its attestation key"):
            verify(encoded(bytes(quote)))


def test_bytes_that_nobody_signs_are_no_part_of_what_is_verified():
    # The same report with and without the NUL behind its chain: other bytes, same enclave.
    other = Toy(report_data=BOUND, chain_ending=b"")
    assert other.quote != TOY.quote
    assert verify(encoded(other.quote)) == verify(encoded(TOY.quote))
    assert struct.unpack_from("<I", other.quote, 432) != struct.unpack_from("<I", TOY.quote, 432)
