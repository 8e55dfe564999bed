"""Quotes of a toy platform, and two verifiers: ours, and `dcap-qvl` in Rust by others."""

import datetime

import dcap_qvl

from tempo_jax.attestation.quote import parse_quote, verify_quote
from tempo_jax.attestation.tcb import Collateral, Status
from tests.support.toy_pki import (
    NOW,
    Toy,
)

TOY = Toy()
COLLATERAL = Collateral.from_json(TOY.collateral_json)


def verify(toy: Toy, now: datetime.datetime = NOW, root: Toy = TOY) -> Status:
    collateral = Collateral.from_json(toy.collateral_json)
    return verify_quote(parse_quote(toy.quote), collateral, now, root_sha256=root.root_sha256)


def verify_with_dcap_qvl(toy: Toy, now: datetime.datetime = NOW, root: Toy = TOY) -> Status:
    """The same by `dcap-qvl`, which raises `ValueError`."""
    collateral = dcap_qvl.QuoteCollateralV3.from_json(toy.collateral_json)
    found = dcap_qvl.verify_with_root_ca(toy.quote, collateral, root.root_der, int(now.timestamp()))
    return Status(found.status, tuple(found.advisory_ids))


def patched(encoded: bytes, offset: int, content: bytes) -> bytes:
    return encoded[:offset] + content + encoded[offset + len(content) :]


AUTH_LENGTH = 1012  # where the length of the authentication data stands
CERTIFICATION = AUTH_LENGTH + 2 + len(TOY.qe_auth_data)

# Flipped bits


def verify_encoded(encoded: bytes) -> Status:
    return verify_quote(parse_quote(encoded), COLLATERAL, NOW, root_sha256=TOY.root_sha256)
