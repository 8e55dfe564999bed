"""Quotes, chains, collateral and Intel's extension are read or refused, whatever the bytes."""

import json
import struct

import dcap_qvl
import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from enclave_runtime.protocol.evidence import MAX_QUOTE
from tempo_jax.attestation import tcb
from tempo_jax.attestation.pck import SGXPlatform, read_extension
from tempo_jax.attestation.quote import parse_quote
from tempo_jax.attestation.tcb import Collateral
from tempo_jax.errors import AttestationError
from tests.support.quotes import (
    AUTH_LENGTH,
    CERTIFICATION,
    COLLATERAL,
    TOY,
    patched,
    verify,
    verify_encoded,
)
from tests.support.toy_pki import (
    COMPONENTS,
    DEBUG_ATTRIBUTES,
    NOW,
    Toy,
    der,
    sgx_extension,
)


def test_report_is_read_from_its_places():
    toy = Toy(attributes=DEBUG_ATTRIBUTES, product_id=0x0102, svn=0x0304)
    report = parse_quote(toy.quote).report
    assert report.debug
    assert (report.product_id, report.svn) == (0x0102, 0x0304)
    raw = toy.quote
    assert (raw[112:144], raw[176:208]) == (report.mrenclave, report.mrsigner)
    assert struct.unpack("<HH", raw[304:308]) == (report.product_id, report.svn)
    assert raw[368:432] == report.report_data


LENGTHS = range(len(TOY.quote))


def test_quote_cut_off_anywhere_is_refused():
    for length in LENGTHS:
        with pytest.raises(AttestationError, match="is cut off"):
            parse_quote(TOY.quote[:length])


def test_quote_cut_off_anywhere_with_its_length_made_right_is_refused():
    for length in LENGTHS[436:]:
        cut = patched(TOY.quote, 432, struct.pack("<I", length - 436))[:length]
        with pytest.raises(AttestationError, match="signature data of .* is cut off"):
            parse_quote(cut)


@pytest.mark.parametrize(
    ("encoded", "text"),
    [
        (TOY.quote + b"\0", "1 bytes follow a quote"),
        (patched(TOY.quote, 432, struct.pack("<I", len(TOY.quote) - 435)), "is cut off"),
        (patched(TOY.quote, 432, b"\xff" * 4), "is cut off: 4294967731 bytes needed"),
        (patched(TOY.quote, AUTH_LENGTH, b"\xff\xff"), "signature data of .* is cut off"),
        (patched(TOY.quote, CERTIFICATION, b"\1\0"), "certification data of type 1, expected 5"),
        (patched(TOY.quote, CERTIFICATION + 2, b"\xff" * 4), "signature data of .* is cut off"),
        (patched(TOY.quote, CERTIFICATION + 2, b"\1\0\0\0"), "bytes follow a quote's signature"),
        (patched(TOY.quote, 0, b"\4"), "a quote of version 4 and key type 2"),
        (patched(TOY.quote, 2, b"\3"), "a quote of version 3 and key type 3"),
        (patched(TOY.quote, 4, b"\x81"), "expected an SGX quote of version 3"),
        (patched(TOY.quote, 12, b"\0"), "quoting enclave that is not Intel's"),
        (TOY.quote + bytes(MAX_QUOTE), f"expected at most {MAX_QUOTE}"),
    ],
)
def test_malformed_quote_is_refused(encoded, text):
    with pytest.raises(AttestationError, match=text):
        parse_quote(encoded)


@pytest.mark.parametrize(
    ("chain", "text"),
    [
        (b"", "a chain of 0 certificates, expected 3"),
        (b"hello", "not a series of PEM certificates"),
        (TOY.pck_chain + b"hello", "not a series of PEM certificates"),
        (b"hello" + TOY.pck_chain, "not a series of PEM certificates"),
        (TOY.pck_chain + b"\0", "not a series of PEM certificates"),
        (TOY.pck_chain + TOY.pck_chain, "a chain of 6 certificates, expected 3"),
        (TOY.pck_chain.replace(b"CERTIFICATE", b"X509 CRL"), "not a series of PEM certificates"),
        (TOY.pck_chain.replace(b"M", b"=", 1), "is not base64"),
        (b"\n" * (1 << 15) + b"\n", "a certificate chain of 32769 bytes"),
    ],
)
def test_malformed_chain_is_refused(chain, text):
    with pytest.raises(AttestationError, match=text):
        verify(Toy(chain=chain, chain_ending=b"\0"))


def test_line_ends_of_windows_are_taken():
    assert verify(Toy(chain=TOY.pck_chain.replace(b"\n", b"\r\n"))).name == "UpToDate"


@given(encoded=st.binary(max_size=1200))
@example(encoded=b"")
def test_any_bytes_are_parsed_or_refused(encoded):
    for content in (encoded, TOY.quote[: 432 + len(encoded) % 8] + encoded):
        try:
            parse_quote(content)
        except AttestationError:
            continue


@given(
    offset=st.integers(0, len(TOY.quote) - 1),
    content=st.binary(min_size=1, max_size=40),
)
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore:Parsed a serial number:UserWarning")
def test_what_is_accepted_dcap_qvl_accepts_as_well(offset, content):
    encoded = patched(TOY.quote, offset, content)[: len(TOY.quote)]
    try:
        ours = verify_encoded(encoded)
    except AttestationError:
        return
    collateral = dcap_qvl.QuoteCollateralV3.from_json(TOY.collateral_json)
    theirs = dcap_qvl.verify_with_root_ca(encoded, collateral, TOY.root_der, int(NOW.timestamp()))
    assert theirs.status == ours.name


# Collateral


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "collateral does not parse as JSON"),
        ("[" * 100_000, "collateral does not parse as JSON"),
        ("[]", "collateral is not a JSON object"),
        ("{}", "collateral lacks the text field `tcb_info_issuer_chain`"),
        (TOY.collateral_json.replace('"root_ca_crl": "', '"root_ca_crl": "x'), "is not hex"),
        (" " * tcb.MAX_COLLATERAL + "{}", "expected at most"),
    ],
)
def test_malformed_collateral_is_refused(text, message):
    with pytest.raises(AttestationError, match=message):
        Collateral.from_json(text)


def test_collateral_of_the_wrong_type_is_refused():
    fields = {**json.loads(TOY.collateral_json), "pck_crl": 5}
    with pytest.raises(AttestationError, match="lacks the text field `pck_crl`"):
        Collateral.from_json(json.dumps(fields))


def test_collateral_of_dcap_qvl_is_read():
    theirs = dcap_qvl.QuoteCollateralV3.from_json(TOY.collateral_json)
    assert Collateral.from_json(theirs.to_json()) == COLLATERAL


def test_collateral_does_not_show_its_content():
    assert repr(COLLATERAL) == "Collateral(...)"


# Intel's extension


EXTENSION = sgx_extension(bytes(range(6)), COMPONENTS, 0x0102)


def test_extension_is_read():
    expected = SGXPlatform(bytes(range(6)), bytes(2), COMPONENTS, 0x0102)
    assert read_extension(EXTENSION) == expected


def test_extension_cut_off_anywhere_is_refused():
    for length in range(len(EXTENSION)):
        with pytest.raises(AttestationError, match="an SGX extension"):
            read_extension(EXTENSION[:length])


ARC = bytes.fromhex("2a864886f84d010d01")


def pair(suffix: bytes, element: bytes) -> bytes:
    return der(0x30, der(0x06, ARC + suffix) + element)


FMSPC = pair(b"\x04", der(0x04, bytes(6)))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (EXTENSION + b"\5\0", "is not a sequence"),
        (der(0x30, FMSPC + FMSPC), "names a foreign field, or one twice"),
        (der(0x30, der(0x30, der(0x06, b"\x2a\x04") + b"\5\0")), "names a foreign field"),
        (der(0x30, der(0x30, der(0x06, b"") + b"\5\0")), "names a foreign field"),
        (der(0x30, der(0x30, FMSPC)), "not a sequence of named values"),
        (der(0x30, FMSPC), "lacks a field"),
        (b"\x30\x80\0\0", "is not DER"),
        (b"\x30\x81\x01\0", "is not DER"),
        (b"\x30\x82\x00\x80" + bytes(128), "is not DER"),
        (b"\x30\x84\xff\xff\xff\xff", "is not DER"),
        (sgx_extension(bytes(5), COMPONENTS, 1), "PCE ID or FMSPC has the wrong length"),
        (sgx_extension(bytes(6), COMPONENTS[1:], 1), "lacks a field"),
        (sgx_extension(bytes(6), COMPONENTS, 0x10000), "number .* is out of range"),
        (EXTENSION.replace(b"\2\1\x0b", b"\2\1\xff"), "number .* is out of range"),
    ],
)
def test_malformed_extension_is_refused(content, text):
    with pytest.raises(AttestationError, match=text):
        read_extension(content)


@given(content=st.binary(max_size=60), offset=st.integers(0, len(EXTENSION)))
def test_any_extension_is_read_or_refused(content, offset):
    for encoded in (content, patched(EXTENSION, offset, content)):
        try:
            read_extension(encoded)
        except AttestationError:
            continue
