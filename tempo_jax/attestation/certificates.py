"""Certificates and revocation lists of Intel's SGX PKI, as the client checks them.

Runs on the client; trusts `cryptography`, one pinned root and the caller's clock. The PKI has a
fixed shape, root → signer or root → CA → PCK, so chains of exactly that shape are accepted and no
path is searched for.

References:
  Intel SGX PCK Certificate and Certificate Revocation List Profile Specification.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import re
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID

from tempo_jax.errors import AttestationError

# SHA-256 of the DER of "Intel SGX Root CA", valid from 2018-05-21 to 2049-12-31.
INTEL_ROOT_SHA256 = bytes.fromhex(
    "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
)
ROOT_NAME = "Intel SGX Root CA"
PCK_CA_NAMES = ("Intel SGX PCK Processor CA", "Intel SGX PCK Platform CA")
PCK_NAME = "Intel SGX PCK Certificate"
SIGNER_NAME = "Intel SGX TCB Signing"
SIGNATURE_BYTES = 64  # r ‖ s, as quotes and Intel's JSON documents carry them
MAX_CHAIN_BYTES = 1 << 15

_PEM = re.compile(
    rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\r\n]+)-----END CERTIFICATE-----[\r\n]*"
)
_KNOWN_CRITICAL = (x509.BasicConstraints.oid, x509.KeyUsage.oid)
# `cryptography` has no common base for what it raises on certificates it cannot read.
MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def split_pem(chain: bytes) -> tuple[bytes, ...]:
    """The certificates of a PEM chain as DER; nothing but certificates may stand in it.

    Raises:
      AttestationError: other text, or not base64.
    """
    if len(chain) > MAX_CHAIN_BYTES:
        raise AttestationError(
            f"a certificate chain of {len(chain)} bytes, expected at most {MAX_CHAIN_BYTES}"
        )
    certificates, position = [], 0
    while position < len(chain):
        match = _PEM.match(chain, position)
        if match is None:
            raise AttestationError("a certificate chain is not a series of PEM certificates")
        text = match[1].replace(b"\r", b"").replace(b"\n", b"")
        try:
            certificates.append(base64.b64decode(text, validate=True))
        except ValueError as error:
            raise AttestationError("a certificate in a PEM chain is not base64") from error
        position = match.end()
    return tuple(certificates)


def load_chain(
    certificates: Sequence[bytes], names: Sequence[Sequence[str]], root_sha256: bytes
) -> tuple[x509.Certificate, ...]:
    """Loads a chain, leaf first, and checks everything but dates and revocation.

    Args:
      certificates: DER, leaf first and root last.
      names: for each place in the chain the common names that may stand there. One root issues
        certificates of several roles, so a role is told by its name.
      root_sha256: SHA-256 of the root's DER.

    Raises:
      AttestationError: another length, name, root, key type, or a signature that does not hold.
    """
    if len(certificates) != len(names):
        raise AttestationError(
            f"a chain of {len(certificates)} certificates, expected {len(names)}: "
            f"{' ← '.join(' or '.join(n) for n in names)}"
        )
    if not hmac.compare_digest(hashlib.sha256(certificates[-1]).digest(), root_sha256):
        raise AttestationError(
            "a certificate chain does not end in the pinned root: the quote or its collateral "
            "comes from another PKI"
        )
    try:
        chain = tuple(x509.load_der_x509_certificate(der) for der in certificates)
        for position, (certificate, allowed) in enumerate(zip(chain, names, strict=True)):
            _check_profile(certificate, allowed, depth=position)
        for certificate, issuer in zip(chain, (*chain[1:], chain[-1]), strict=True):
            certificate.verify_directly_issued_by(issuer)
    except MALFORMED as error:
        raise AttestationError("a certificate of a chain is malformed") from error
    except InvalidSignature as error:
        raise AttestationError(
            "a certificate's signature does not hold under its issuer's key"
        ) from error
    return chain


def _check_profile(certificate: x509.Certificate, names: Sequence[str], depth: int) -> None:
    """RFC 5280, 6.1.4 (k) to (o), for a certificate with `depth` others below it."""
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(common) != 1 or common[0].value not in names:
        raise AttestationError(
            f"a chain has another certificate where {' or '.join(names)} should stand"
        )
    public_key(certificate)
    if not isinstance(certificate.signature_hash_algorithm, hashes.SHA256):
        raise AttestationError("a certificate is not signed with ECDSA and SHA-256")
    extensions = certificate.extensions
    if any(e.critical and e.oid not in _KNOWN_CRITICAL for e in extensions):
        raise AttestationError("a certificate has a critical extension that is not known here")
    basic = extensions.get_extension_for_class(x509.BasicConstraints).value
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    if basic.ca != (depth > 0) or usage.key_cert_sign != (depth > 0):
        raise AttestationError("a certificate authority stands where none should, or none does")
    if depth == 0 and not usage.digital_signature:
        raise AttestationError("a leaf certificate may not be used for signatures")
    if basic.path_length is not None and basic.path_length < depth - 1:
        raise AttestationError("a chain is longer than a certificate authority allows")


def public_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """The P-256 key of a certificate.

    Raises:
      AttestationError: a key of another type.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AttestationError("a certificate's key is not on the curve P-256")
    return key


def check_dates(chain: Sequence[x509.Certificate], now: datetime.datetime) -> None:
    """Every certificate is valid at `now`.

    Raises:
      AttestationError: one is not yet or no longer valid.
    """
    for certificate in chain:
        check_period(
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            now,
            "a certificate of the chain",
        )


def check_period(
    start: datetime.datetime, end: datetime.datetime, now: datetime.datetime, what: str
) -> None:
    """`now` lies in a period of validity.

    Raises:
      AttestationError: it does not.
    """
    if now < start:
        raise AttestationError(
            f"{what} is not valid before {start:%Y-%m-%d %H:%M:%S}: check this machine's clock"
        )
    if now > end:
        raise AttestationError(
            f"{what} expired on {end:%Y-%m-%d %H:%M:%S}: fetch fresh collateral; a quote's own "
            "certificates come from the enclave's machine"
        )


def check_not_revoked(
    encoded: bytes,
    issuer: x509.Certificate,
    certificates: Sequence[x509.Certificate],
    now: datetime.datetime,
) -> None:
    """Checks certificates of one issuer against that issuer's revocation list.

    Args:
      encoded: the list, DER.
      issuer: a certificate already verified.
      certificates: what it issued.
      now: the time at which the list must be in date.

    Raises:
      AttestationError: the list is malformed, another's, forged or out of date, or a
        certificate is revoked.
    """
    try:
        crl = x509.load_der_x509_crl(encoded)
        ours = crl.issuer == issuer.subject and isinstance(
            crl.signature_hash_algorithm, hashes.SHA256
        )
        critical = any(extension.critical for extension in crl.extensions)
        if not ours or critical or not crl.is_signature_valid(public_key(issuer)):
            raise AttestationError(
                "a revocation list is not its issuer's: root_ca_crl must be signed by the root, "
                "pck_crl by the CA that issued the PCK certificate (Processor or Platform)"
            )
        start, end = crl.last_update_utc, crl.next_update_utc
        if end is None:
            raise AttestationError("a revocation list has no date of its next update")
        check_period(start, end, now, "a revocation list")
        revoked = any(
            crl.get_revoked_certificate_by_serial_number(c.serial_number) for c in certificates
        )
    except MALFORMED as error:
        raise AttestationError("a revocation list is malformed") from error
    if revoked:
        raise AttestationError(
            "a certificate of the chain is revoked: its issuer no longer vouches for the platform"
        )


def is_signed(key: ec.EllipticCurvePublicKey, signature: bytes, content: bytes) -> bool:
    """Whether r ‖ s is an ECDSA signature with SHA-256 over `content`."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
    try:
        key.verify(encode_dss_signature(r, s), content, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
