"""SGX quotes: parsing, and verification up to a TCB status.

Runs on the client, on bytes that whoever answers the connection chose. A quote (version 3,
ECDSA on P-256) is a report of an enclave signed by Intel's quoting enclave on the same
machine, whose own report is signed by the machine's PCK certificate, which Intel issued. What
is accepted of it is `attestation.policy`'s business.

References:
  Intel SGX ECDSA QuoteLibReference DCAP API, A.4 (quote format).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.asymmetric import ec

from enclave_runtime.protocol.evidence import MAX_QUOTE
from tempo_jax.attestation import certificates, tcb
from tempo_jax.attestation.certificates import INTEL_ROOT_SHA256, PCK_CA_NAMES, PCK_NAME, ROOT_NAME
from tempo_jax.attestation.pck import platform_of
from tempo_jax.attestation.tcb import Collateral, Status
from tempo_jax.errors import AttestationError

HEADER_BYTES = 48
REPORT_BYTES = 384
SIGNED_BYTES = HEADER_BYTES + REPORT_BYTES  # what the attestation key signs
KEY_BYTES = 64
DEBUG = 0x02  # of the attributes' first byte (Intel SDM, vol. 3D, ATTRIBUTES)
INTEL_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

_HEADER = struct.Struct("<HHI HH 16s 20s")
_PCK_CHAIN = 5  # the only type of certification data that carries the certificates


@dataclasses.dataclass(frozen=True)
class ReportBody:
    """What the processor says of an enclave; offsets in bytes, integers little-endian.

    0 CPU SVN, 16        16 MISCSELECT, 4       48 attributes, 16   64 MRENCLAVE, 32
    128 MRSIGNER, 32     256 product id, 2      258 SVN, 2          320 report data, 64
    """

    misc_select: bytes
    attributes: bytes
    mrenclave: bytes
    mrsigner: bytes
    product_id: int
    svn: int
    report_data: bytes

    @property
    def debug(self) -> bool:
        """Whether the host may read and write the enclave's memory."""
        return bool(self.attributes[0] & DEBUG)

    @classmethod
    def decode(cls, encoded: bytes) -> ReportBody:
        """Reads a report body of `REPORT_BYTES` bytes."""
        assert len(encoded) == REPORT_BYTES
        product_id, svn = struct.unpack_from("<HH", encoded, 256)
        return cls(
            misc_select=encoded[16:20],
            attributes=encoded[48:64],
            mrenclave=encoded[64:96],
            mrsigner=encoded[128:160],
            product_id=product_id,
            svn=svn,
            report_data=encoded[320:384],
        )


@dataclasses.dataclass(frozen=True)
class Quote:
    """A parsed quote; nothing in it is verified.

    Its bytes name nobody: some of them are signed by no one, and an ECDSA signature has a
    second form. Use the report's fields.

    Attributes:
      signed: header and report, the bytes that `signature` covers.
      report: the enclave's.
      signature: r ‖ s by the attestation key.
      attestation_key: x ‖ y, made by the quoting enclave.
      qe_report: the quoting enclave's report, as the PCK certificate's key signed it.
      qe_signature: r ‖ s over it.
      qe_auth_data: bound together with the attestation key by the quoting enclave's report.
      certificates: PCK certificate, its CA and the root, DER.
    """

    signed: bytes
    report: ReportBody
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_signature: bytes
    qe_auth_data: bytes
    certificates: tuple[bytes, ...]


class _Reader:
    """Takes bytes from the front; `what` names what is cut off where they end."""

    def __init__(self, content: bytes, what: str):
        self._content = content
        self._what = what
        self._position = 0

    def take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._content):
            raise AttestationError(
                f"{self._what} of {len(self._content)} bytes is cut off: {end} bytes needed"
            )
        taken = self._content[self._position : end]
        self._position = end
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def finish(self) -> None:
        extra = len(self._content) - self._position
        if extra:
            raise AttestationError(f"{extra} bytes follow {self._what}")


def parse_quote(encoded: bytes) -> Quote:
    """Parses a quote, version 3; integers are little-endian.

      bytes 0-1   version, 3              bytes 48-431   report, see `Report`
      bytes 2-3   key type, 2: P-256      bytes 432-435  length of what follows
      bytes 4-7   zero                    bytes 436-499  signature over bytes 0-431
      bytes 8-11  SVNs of QE and PCE      bytes 500-563  attestation key
      bytes 12-27 QE vendor, Intel        bytes 564-947  quoting enclave's report
      bytes 28-47 user data               bytes 948-1011 the PCK's signature over that report

    then a 2-byte length and the authentication data, a 2-byte type (5), a 4-byte length and the
    PCK chain as PEM, behind which one NUL may stand. Every length is checked before use.

    Raises:
      AttestationError: anything else.
    """
    if len(encoded) > MAX_QUOTE:
        raise AttestationError(f"a quote of {len(encoded)} bytes, expected at most {MAX_QUOTE}")
    reader = _Reader(encoded, "a quote")
    signed = reader.take(SIGNED_BYTES)
    version, key_type, reserved, _, _, vendor, _ = _HEADER.unpack_from(signed)
    if (version, key_type, reserved) != (3, 2, 0):
        raise AttestationError(
            f"a quote of version {version} and key type {key_type}, expected an SGX quote of "
            "version 3 with an ECDSA key on P-256 (key type 2)"
        )
    if vendor != INTEL_QE_VENDOR:
        raise AttestationError("a quote of a quoting enclave that is not Intel's")
    body = _Reader(reader.take(reader.number(4)), "a quote's signature data")
    reader.finish()
    signature = body.take(certificates.SIGNATURE_BYTES)
    key = body.take(KEY_BYTES)
    qe_report = body.take(REPORT_BYTES)
    qe_signature = body.take(certificates.SIGNATURE_BYTES)
    auth_data = body.take(body.number(2))
    if (kind := body.number(2)) != _PCK_CHAIN:
        raise AttestationError(
            f"a quote with certification data of type {kind}, expected {_PCK_CHAIN} (a PCK "
            "certificate chain): give the machine's quote provider access to a PCCS"
        )
    chain = body.take(body.number(4))
    body.finish()
    return Quote(
        signed,
        ReportBody.decode(signed[HEADER_BYTES:]),
        signature,
        key,
        qe_report,
        qe_signature,
        auth_data,
        certificates.split_pem(chain.removesuffix(b"\0")),
    )


def verify_quote(
    quote: Quote,
    collateral: Collateral,
    now: datetime.datetime,
    *,
    root_sha256: bytes = INTEL_ROOT_SHA256,
) -> Status:
    """Verifies that a quote's report comes from an SGX enclave on hardware Intel vouches for.

    What the enclave is and whether the status is good enough are the caller's to judge.

    Args:
      quote: what `parse_quote` gave.
      collateral: Intel's documents for the quote's platform.
      now: the time to verify at, with its zone.
      root_sha256: SHA-256 of the root's DER; another than Intel's only in tests.

    Returns:
      The platform's TCB status, made worse by the quoting enclave's where that is worse.

    Raises:
      AttestationError: a signature, date, chain, revocation list or document does not hold, or
        the platform is not one that the collateral describes.
    """
    names = ((PCK_NAME,), PCK_CA_NAMES, (ROOT_NAME,))
    chain = certificates.load_chain(quote.certificates, names, root_sha256)
    certificates.check_dates(chain, now)
    pck, issuer, root = chain
    tcb_info, tcb_signer = tcb.verify_tcb_info(collateral, now, root_sha256)
    identity, identity_signer = tcb.verify_qe_identity(collateral, now, root_sha256)
    of_root = (issuer, tcb_signer, identity_signer)
    certificates.check_not_revoked(collateral.root_ca_crl, root, of_root, now)
    certificates.check_not_revoked(collateral.pck_crl, issuer, (pck,), now)
    _verify_signatures(quote, certificates.public_key(pck))
    qe = ReportBody.decode(quote.qe_report)
    quoting = identity.status(
        misc_select=qe.misc_select,
        attributes=qe.attributes,
        mrsigner=qe.mrsigner,
        product_id=qe.product_id,
        svn=qe.svn,
    )
    platform = tcb_info.status(platform_of(pck))
    return tcb.converge(platform, quoting)


def _verify_signatures(quote: Quote, pck_key: ec.EllipticCurvePublicKey) -> None:
    """PCK → quoting enclave's report → attestation key → header and enclave's report."""
    if not certificates.is_signed(pck_key, quote.qe_signature, quote.qe_report):
        raise AttestationError("the quoting enclave's report is not signed by the PCK certificate")
    digest = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest()
    bound = ReportBody.decode(quote.qe_report).report_data
    if not hmac.compare_digest(bound, digest + bytes(32)):
        raise AttestationError("the quoting enclave's report is for another attestation key")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(
            ec.SECP256R1(), b"\x04" + quote.attestation_key
        )
    except ValueError as error:
        raise AttestationError("a quote's attestation key is no point of P-256") from error
    if not certificates.is_signed(key, quote.signature, quote.signed):
        raise AttestationError("the quote is not signed by its attestation key")
