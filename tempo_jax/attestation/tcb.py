"""Collateral: what Intel says of platforms and quoting enclaves, signed and with dates.

Runs on the client. The documents come from Intel's provisioning certification service or a cache of
it (PCCS), by whatever way: they are checked here and not trusted. Their JSON form is the one that
`dcap-qvl` and its cousins read and write, so their downloads can be used as they are.

References:
  Intel PCS API v4, https://api.portal.trustedservices.intel.com/content/documentation.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from cryptography import x509

from tempo_jax.attestation import certificates
from tempo_jax.attestation.certificates import ROOT_NAME, SIGNER_NAME
from tempo_jax.attestation.pck import SGXPlatform
from tempo_jax.errors import AttestationError

STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)
QE_STATUSES = ("UpToDate", "OutOfDate", "Revoked")  # a quoting enclave has no configuration
MAX_COLLATERAL = 1 << 22  # bytes of JSON
_TEXTS = ("tcb_info_issuer_chain", "tcb_info", "qe_identity_issuer_chain", "qe_identity")
_BYTES = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")


class Status(NamedTuple):
    """A TCB status and the security advisories behind it."""

    name: str
    advisories: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Collateral:
    """The documents that verifying a quote takes, unverified.

    Attributes:
      root_ca_crl: the root's revocation list, DER.
      pck_crl: revocation list of the CA that issues PCK certificates, DER.
      tcb_info: Intel's appraisal of one platform type, JSON, byte for byte as signed.
      tcb_info_signature: r ‖ s over it.
      tcb_info_issuer_chain: the signer's chain, PEM.
      qe_identity: Intel's description of its quoting enclave, JSON as signed.
      qe_identity_signature: r ‖ s over it.
      qe_identity_issuer_chain: the signer's chain, PEM.
    """

    root_ca_crl: bytes
    pck_crl: bytes
    tcb_info: str
    tcb_info_signature: bytes
    tcb_info_issuer_chain: str
    qe_identity: str
    qe_identity_signature: bytes
    qe_identity_issuer_chain: str

    def __repr__(self) -> str:
        return "Collateral(...)"

    @classmethod
    def from_json(cls, text: str | bytes) -> Collateral:
        """Reads one JSON object, binary fields in hex, as `dcap_qvl` writes it (`to_json`).

        Other fields, such as `pck_crl_issuer_chain`, are left alone: the chain that issued the
        revocation list has to be the quote's own.

        Raises:
          AttestationError: too long, not JSON, or a field is missing or of another type.
        """
        if len(text) > MAX_COLLATERAL:
            raise AttestationError(
                f"collateral of {len(text)} bytes, expected at most {MAX_COLLATERAL}"
            )
        fields = _parse(text, "collateral")
        found: dict[str, Any] = {}
        for name in (*_TEXTS, *_BYTES):
            if not isinstance(fields.get(name), str):
                raise AttestationError(f"collateral lacks the text field `{name}`")
            found[name] = fields[name]
        for name in _BYTES:
            try:
                found[name] = bytes.fromhex(found[name])
            except ValueError as error:
                raise AttestationError(f"collateral's field `{name}` is not hex") from error
        return cls(**found)


@dataclasses.dataclass(frozen=True)
class TCBLevel:
    """A level is reached when no security version number is below its own."""

    components: tuple[int, ...]
    pce_svn: int
    status: Status


@dataclasses.dataclass(frozen=True)
class TCBInfo:
    """Verified TCB info, levels from best to worst as Intel lists them."""

    fmspc: bytes
    pce_id: bytes
    levels: tuple[TCBLevel, ...]

    def status(self, platform: SGXPlatform) -> Status:
        """Status of the first level that the platform reaches.

        Raises:
          AttestationError: TCB info for another platform type, or below every level.
        """
        if (self.fmspc, self.pce_id) != (platform.fmspc, platform.pce_id):
            raise AttestationError(
                f"the collateral's TCB info is for FMSPC {self.fmspc.hex()} and PCE ID "
                f"{self.pce_id.hex()}, the platform has {platform.fmspc.hex()} and "
                f"{platform.pce_id.hex()}: fetch collateral for these"
            )
        for level in self.levels:
            pairs = zip(platform.components, level.components, strict=True)
            if platform.pce_svn >= level.pce_svn and all(own >= least for own, least in pairs):
                return level.status
        raise AttestationError(
            "the platform's TCB is below every level that Intel lists: update its firmware"
        )


@dataclasses.dataclass(frozen=True)
class QEIdentity:
    """Verified identity of Intel's quoting enclave; masks say which bits count."""

    misc_select: tuple[bytes, bytes]
    attributes: tuple[bytes, bytes]
    mrsigner: bytes
    product_id: int
    levels: tuple[tuple[int, Status], ...]

    def status(
        self, *, misc_select: bytes, attributes: bytes, mrsigner: bytes, product_id: int, svn: int
    ) -> Status:
        """Status of a quoting enclave with these fields in its report.

        Raises:
          AttestationError: it is not Intel's quoting enclave, or older than every level.
        """
        pairs = ((misc_select, self.misc_select), (attributes, self.attributes))
        masked = all(_masked(own, mask) == _masked(want, mask) for own, (want, mask) in pairs)
        if not masked or (mrsigner, product_id) != (self.mrsigner, self.product_id):
            raise AttestationError("the quote was not made by Intel's quoting enclave")
        for least, status in self.levels:
            if svn >= least:
                return status
        raise AttestationError(
            "the platform's quoting enclave is older than every version that Intel lists: update "
            "the platform's SGX software"
        )


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(v & m for v, m in zip(value, mask, strict=True))


def converge(platform: Status, quoting: Status) -> Status:
    """The status of a platform whose quoting enclave has a status of its own.

    As Intel's verification library does it: a quoting enclave that is out of date makes the
    platform so, and a revoked one revokes it. It has no other status, see `verify_qe_identity`.
    """
    advisories = tuple(dict.fromkeys((*platform.advisories, *quoting.advisories)))
    name = platform.name
    if "Revoked" in (platform.name, quoting.name):
        name = "Revoked"
    elif quoting.name == "OutOfDate":
        configuration = "Configuration" in platform.name
        name = "OutOfDateConfigurationNeeded" if configuration else "OutOfDate"
    return Status(name, advisories)


# Signed documents


def verify_tcb_info(
    collateral: Collateral, now: datetime.datetime, root_sha256: bytes
) -> tuple[TCBInfo, x509.Certificate]:
    """Verifies the TCB info and its signer's chain; revocation is the caller's.

    Returns:
      The TCB info and the certificate of its signer.

    Raises:
      AttestationError: forged, out of date, or not of the format (SGX, version 3).
    """
    fields, signer = _verify_document(
        collateral.tcb_info,
        collateral.tcb_info_signature,
        collateral.tcb_info_issuer_chain,
        now,
        root_sha256,
        "TCB info",
    )
    with _reading("TCB info"):
        if (fields["id"], fields["version"], fields["tcbType"]) != ("SGX", 3, 0):
            raise AttestationError("TCB info is not for SGX in version 3: use the PCS API v4")
        levels = []
        for level in fields["tcbLevels"]:
            components = tuple(_svn(c["svn"], 0xFF) for c in level["tcb"]["sgxtcbcomponents"])
            if len(components) != 16:
                raise AttestationError("a level of TCB info does not have 16 components")
            pce_svn = _svn(level["tcb"]["pcesvn"], 0xFFFF)
            levels.append(TCBLevel(components, pce_svn, _status(level)))
        fmspc, pce_id = _hex(fields["fmspc"], 6), _hex(fields["pceId"], 2)
    return TCBInfo(fmspc, pce_id, tuple(levels)), signer


def verify_qe_identity(
    collateral: Collateral, now: datetime.datetime, root_sha256: bytes
) -> tuple[QEIdentity, x509.Certificate]:
    """Verifies the quoting enclave's identity and its signer's chain; revocation is the caller's.

    Returns:
      The identity and the certificate of its signer.

    Raises:
      AttestationError: forged, out of date, not of the format (QE, version 2), or with a level
        whose status only a platform can have.
    """
    fields, signer = _verify_document(
        collateral.qe_identity,
        collateral.qe_identity_signature,
        collateral.qe_identity_issuer_chain,
        now,
        root_sha256,
        "QE identity",
    )
    with _reading("QE identity"):
        if (fields["id"], fields["version"]) != ("QE", 2):
            raise AttestationError("a QE identity is not SGX's in version 2: use the PCS API v4")
        levels = tuple(
            (_svn(level["tcb"]["isvsvn"], 0xFFFF), _status(level)) for level in fields["tcbLevels"]
        )
        for _, status in levels:
            # `converge` knows what these make of a platform, and Intel lists no other.
            if status.name not in QE_STATUSES:
                raise AttestationError(
                    f"a QE identity has a level with the status {status.name}, expected one of "
                    f"{', '.join(QE_STATUSES)}"
                )
        identity = QEIdentity(
            (_hex(fields["miscselect"], 4), _hex(fields["miscselectMask"], 4)),
            (_hex(fields["attributes"], 16), _hex(fields["attributesMask"], 16)),
            _hex(fields["mrsigner"], 32),
            _svn(fields["isvprodid"], 0xFFFF),
            levels,
        )
    return identity, signer


def _verify_document(
    text: str,
    signature: bytes,
    chain: str,
    now: datetime.datetime,
    root_sha256: bytes,
    what: str,
) -> tuple[dict[str, Any], x509.Certificate]:
    signers = certificates.load_chain(
        certificates.split_pem(chain.encode()), ((SIGNER_NAME,), (ROOT_NAME,)), root_sha256
    )
    certificates.check_dates(signers, now)
    key = certificates.public_key(signers[0])
    if not certificates.is_signed(key, signature, text.encode()):
        raise AttestationError(
            f"{what} is not signed by Intel: it must stay byte for byte as the service sent it"
        )
    fields = _parse(text, what)
    with _reading(what):
        start, end = _date(fields["issueDate"]), _date(fields["nextUpdate"])
    certificates.check_period(start, end, now, what)
    return fields, signers[0]


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns what a field of another type raises into an `AttestationError`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AttestationError(f"{what} lacks a field or has it with another type") from error


def _parse(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AttestationError(f"{what} does not parse as JSON") from error
    if not isinstance(fields, dict):
        raise AttestationError(f"{what} is not a JSON object")
    return fields


def _status(level: dict[str, Any]) -> Status:
    advisories: Iterable[Any] = level.get("advisoryIDs", ())
    if level["tcbStatus"] not in STATUSES:
        raise ValueError("an unknown status")
    return Status(level["tcbStatus"], tuple(str(a) for a in advisories))


def _svn(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError("a number is out of range")
    return value


def _hex(value: str, length: int) -> bytes:
    content = bytes.fromhex(value)
    if len(content) != length:
        raise ValueError("a field has another length")
    return content


def _date(value: str) -> datetime.datetime:
    parsed = datetime.datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ")
    return parsed.replace(tzinfo=datetime.UTC)
