"""Fuzzes what a client reads of a peer that it has not verified: evidence, quotes, certificates."""

from __future__ import annotations

import contextlib
import hashlib
import warnings

from enclave_runtime.protocol import evidence
from enclave_runtime.protocol.evidence import EvidenceError
from tempo_jax.attestation import certificates, pck
from tempo_jax.attestation import quote as quotes
from tempo_jax.attestation.certificates import PCK_CA_NAMES, PCK_NAME, ROOT_NAME
from tempo_jax.errors import AttestationError
from tests.fuzz import harness

_NAMES = ((PCK_NAME,), PCK_CA_NAMES, (ROOT_NAME,))


def one_input(data: bytes) -> None:
    """Takes the input for evidence, for a quote and for Intel's extension of a certificate."""
    with contextlib.suppress(EvidenceError):
        evidence.decode_evidence(data)
    with contextlib.suppress(AttestationError):
        pck.read_extension(data)
    with contextlib.suppress(AttestationError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of `cryptography`, for certificates that are odd
        quote = quotes.parse_quote(data)
        assert quote.report == quotes.ReportBody.decode(quote.signed[quotes.HEADER_BYTES :])
        if quote.certificates:
            # Whoever chooses the quote chooses the root; only its pinned hash would stop it.
            root = hashlib.sha256(quote.certificates[-1]).digest()
            chain = certificates.load_chain(quote.certificates, _NAMES, root)
            pck.platform_of(chain[0])
            quotes._verify_signatures(quote, certificates.public_key(chain[0]))


if __name__ == "__main__":
    harness.fuzz(one_input, (evidence, quotes, certificates, pck))
