"""One flipped bit anywhere in what is signed of a quote: refused."""

import dataclasses
from collections.abc import Iterator

import pytest
from cryptography import x509

from tempo_jax.attestation.quote import Quote, parse_quote, verify_quote
from tempo_jax.errors import AttestationError
from tests.support.quotes import CERTIFICATION, COLLATERAL, TOY, patched, verify_encoded
from tests.support.toy_pki import (
    NOW,
)


def flips(whole: bool) -> Iterator[tuple[int, int]]:
    """One bit of every byte in front of the chain, or all the others."""
    for offset in range(CERTIFICATION + 6):
        for bit in range(8):
            if (bit == offset % 8) != whole:
                yield offset, bit


def certificate_flips(whole: bool) -> Iterator[tuple[int, int, int]]:
    """The same of the three certificates."""
    for number, certificate in enumerate(parse_quote(TOY.quote).certificates):
        for offset in range(len(certificate)):
            for bit in range(8):
                if (bit == offset % 8) != whole:
                    yield number, offset, bit


def signed_parts(quote: Quote) -> list[tuple[bytes, bytes]]:
    """What is signed of each certificate, and the signature; its wrapping nobody signs."""
    loaded = (x509.load_der_x509_certificate(c) for c in quote.certificates)
    return [(c.tbs_certificate_bytes, c.signature) for c in loaded]


def check_flips(whole: bool) -> None:
    parsed = parse_quote(TOY.quote)
    for offset, bit in flips(whole):
        encoded = patched(TOY.quote, offset, bytes([TOY.quote[offset] ^ 1 << bit]))
        with pytest.raises(AttestationError):
            verify_encoded(encoded)
    for number, offset, bit in certificate_flips(whole):
        certificates = list(parsed.certificates)
        certificate = certificates[number]
        certificates[number] = patched(certificate, offset, bytes([certificate[offset] ^ 1 << bit]))
        quote = dataclasses.replace(parsed, certificates=tuple(certificates))
        try:
            verify_quote(quote, COLLATERAL, NOW, root_sha256=TOY.root_sha256)
        except AttestationError:
            continue
        # The count of unused bits in front of a signature (X.690, 8.6.2.2) is all there is.
        assert signed_parts(quote) == signed_parts(parsed)


IGNORE_SERIAL_NUMBERS = "ignore:Parsed a serial number:UserWarning"  # flips make negative ones


@pytest.mark.filterwarnings(IGNORE_SERIAL_NUMBERS)
def test_one_flipped_bit_in_any_signed_byte_is_refused():
    check_flips(whole=False)


@pytest.mark.slow
@pytest.mark.filterwarnings(IGNORE_SERIAL_NUMBERS)
def test_any_flipped_bit_is_refused():
    check_flips(whole=True)


@pytest.mark.slow
@pytest.mark.filterwarnings(IGNORE_SERIAL_NUMBERS)
def test_flipped_bit_of_the_pem_text_is_refused_or_changes_nothing_signed():
    parsed = parse_quote(TOY.quote)
    for offset in range(CERTIFICATION + 6, len(TOY.quote)):
        for bit in range(8):
            encoded = patched(TOY.quote, offset, bytes([TOY.quote[offset] ^ 1 << bit]))
            try:
                assert verify_encoded(encoded).name == "UpToDate"
            except AttestationError:
                continue
            quote = parse_quote(encoded)
            assert (quote.signed, signed_parts(quote)) == (parsed.signed, signed_parts(parsed))
