"""A PKI with the shape of Intel's for SGX, whose keys the tests hold.

Root, PCK CA, PCK certificate with Intel's extension, TCB signer, revocation lists, TCB info, QE
identity and quotes, all in Intel's formats. Every part is a field of `Toy`, so that a test
changes one with `dataclasses.replace` and keeps the rest right. `dcap-qvl` reads it too.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import struct
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from tempo_jax.attestation.quote import DEBUG, INTEL_QE_VENDOR

NOW = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
Key = ec.EllipticCurvePrivateKey
Period = tuple[datetime.datetime, datetime.datetime]

COMPONENTS = (11, 11, 2, 2, 255, 1, *(0,) * 10)
PCE_SVN = 13
MRENCLAVE, MRSIGNER, QE_MRSIGNER = b"\xe1" * 32, b"\x51" * 32, b"\x8c" * 32
PRODUCT_ID, SVN = 3, 7
ATTRIBUTES = bytes([0x05, *(0,) * 7, 0xE7, *(0,) * 7])  # INIT, 64 bits; XFRM behind them
DEBUG_ATTRIBUTES = bytes([ATTRIBUTES[0] | DEBUG]) + ATTRIBUTES[1:]
ROOT, CA, PCK, SIGNER = (
    "Intel SGX Root CA",
    "Intel SGX PCK Processor CA",
    "Intel SGX PCK Certificate",
    "Intel SGX TCB Signing",
)
CA_SERIAL, PCK_SERIAL, SIGNER_SERIAL = 11, 12, 13


@functools.cache
def key(name: str) -> Key:
    """The private key of a name, the same at every call."""
    scalar = int.from_bytes(hashlib.sha256(name.encode()).digest()[:31], "big")
    return ec.derive_private_key(scalar, ec.SECP256R1())


def raw_signature(private: Key, content: bytes) -> bytes:
    """The signature r ‖ s, as quotes and Intel's documents have it."""
    r, s = decode_dss_signature(private.sign(content, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_point(private: Key) -> bytes:
    """The public key, x ‖ y."""
    return private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def spki(private: Key) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def name(common: str) -> x509.Name:
    """A name with this common name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def der(tag: int, content: bytes) -> bytes:
    """One DER element."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    count = (size.bit_length() + 7) // 8
    return bytes([tag, 0x80 + count]) + size.to_bytes(count, "big") + content


def sgx_extension(fmspc: bytes, components: tuple[int, ...], pce_svn: int) -> bytes:
    """The content of Intel's extension of a PCK certificate."""
    arc = bytes.fromhex("2a864886f84d010d01")

    def field(suffix: bytes, element: bytes) -> bytes:
        return der(0x30, der(0x06, arc + suffix) + element)

    def integer(value: int) -> bytes:
        return der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))

    svns = b"".join(field(bytes([2, i + 1]), integer(v)) for i, v in enumerate(components))
    svns += field(b"\x02\x11", integer(pce_svn))
    svns += field(b"\x02\x12", der(0x04, bytes(components)))
    return der(
        0x30,
        field(b"\x01", der(0x04, b"\x9d" * 16))
        + field(b"\x02", der(0x30, svns))
        + field(b"\x03", der(0x04, bytes(2)))
        + field(b"\x04", der(0x04, fmspc))
        + field(b"\x05", der(0x0A, b"\0")),
    )


def report(
    mrenclave: bytes,
    mrsigner: bytes,
    product_id: int,
    svn: int,
    attributes: bytes,
    report_data: bytes,
) -> bytes:
    """A report body."""
    fields = struct.pack(
        "<16s I 28x 16s 32s 32x 32s 96x H H 60x 64s",
        *(b"\x0b" * 16, 0, attributes, mrenclave, mrsigner, product_id, svn, report_data),
    )
    assert len(fields) == 384
    return fields


def level(tcb: dict[str, Any], status: str, advisories: tuple[str, ...] = ()) -> dict[str, Any]:
    """One TCB level of TCB info or a QE identity."""
    return {
        "tcb": tcb,
        "tcbDate": "2026-01-01T00:00:00Z",
        "tcbStatus": status,
        "advisoryIDs": list(advisories),
    }


def tcb_level(
    components: tuple[int, ...], pce_svn: int, status: str, *advisories: str
) -> dict[str, Any]:
    """One level of TCB info."""
    tcb = {"sgxtcbcomponents": [{"svn": v} for v in components], "pcesvn": pce_svn}
    return level(tcb, status, advisories)


LEVELS = (
    tcb_level(COMPONENTS, PCE_SVN, "UpToDate"),
    tcb_level(COMPONENTS, 11, "OutOfDate", "INTEL-SA-00001"),
)
QE_LEVELS = (level({"isvsvn": 8}, "UpToDate"), level({"isvsvn": 5}, "OutOfDate"))


@functools.cache
def certificate(
    common: str,
    issuer: str,
    own: Key,
    signing: Key,
    period: Period,
    serial: int,
    authority: bool,
    extension: bytes | None = None,
    critical: bool = False,
    path_length: int | None = None,
    may_sign: bool = True,
    algorithm: type[hashes.SHA256 | hashes.SHA384] = hashes.SHA256,
) -> x509.Certificate:
    """One certificate, the same for the same arguments: ECDSA signatures are random."""
    usage = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment"),
            *("data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
            *("encipher_only", "decipher_only"),
        ),
        False,
    )
    granted = ("key_cert_sign", "crl_sign") if authority else ("digital_signature",)
    usage.update(dict.fromkeys(granted, may_sign))
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(common))
        .issuer_name(name(issuer))
        .public_key(own.public_key())
        .serial_number(serial)
        .not_valid_before(period[0])
        .not_valid_after(period[1])
        .add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
    )
    if extension is not None:
        identifier = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
        builder = builder.add_extension(
            x509.UnrecognizedExtension(identifier, extension), critical=critical
        )
    return builder.sign(signing, algorithm())


@dataclasses.dataclass(frozen=True)
class Toy:
    """Everything a verifier gets to see; the defaults make a quote that verifies at `NOW`."""

    root_key: Key = dataclasses.field(default_factory=lambda: key("root"))
    ca_key: Key = dataclasses.field(default_factory=lambda: key("ca"))
    pck_key: Key = dataclasses.field(default_factory=lambda: key("pck"))
    signer_key: Key = dataclasses.field(default_factory=lambda: key("signer"))
    attestation_key: Key = dataclasses.field(default_factory=lambda: key("attestation"))
    # Certificates
    root_period: Period = (NOW - 100 * DAY, NOW + 100 * DAY)
    ca_period: Period = (NOW - 90 * DAY, NOW + 90 * DAY)
    pck_period: Period = (NOW - 80 * DAY, NOW + 80 * DAY)
    signer_period: Period = (NOW - 70 * DAY, NOW + 70 * DAY)
    ca_name: str = CA
    pck_name: str = PCK
    signer_name: str = SIGNER
    pck_is_ca: bool = False
    ca_is_ca: bool = True
    ca_algorithm: type[hashes.SHA256 | hashes.SHA384] = hashes.SHA256
    root_path_length: int | None = None
    extension_is_critical: bool = False
    pck_may_sign: bool = True
    fmspc: bytes = bytes.fromhex("00a067110000")
    components: tuple[int, ...] = COMPONENTS
    pce_svn: int = PCE_SVN
    extension: bytes | None = None
    # Revocation
    revoked_by_root: tuple[int, ...] = ()
    revoked_by_ca: tuple[int, ...] = ()
    crl_period: Period = (NOW - DAY, NOW + DAY)
    root_crl_key: Key | None = None
    pck_crl_key: Key | None = None
    # Documents
    document_period: Period = (NOW - DAY, NOW + DAY)
    tcb_fmspc: bytes | None = None
    levels: tuple[dict[str, Any], ...] = LEVELS
    qe_levels: tuple[dict[str, Any], ...] = QE_LEVELS
    tcb_info_changes: tuple[tuple[str, Any], ...] = ()
    qe_identity_changes: tuple[tuple[str, Any], ...] = ()
    # Quote
    mrenclave: bytes = MRENCLAVE
    mrsigner: bytes = MRSIGNER
    product_id: int = PRODUCT_ID
    svn: int = SVN
    attributes: bytes = ATTRIBUTES
    report_data: bytes = bytes(range(64))
    qe_mrsigner: bytes = QE_MRSIGNER
    qe_product_id: int = 1
    qe_svn: int = 8
    qe_attributes: bytes = bytes([0x11, *(0,) * 7, 0xE7, *(0,) * 7])
    qe_auth_data: bytes = bytes(range(32))
    bound_key: Key | None = None
    chain: bytes | None = None
    chain_ending: bytes = b"\0"

    @functools.cached_property
    def root(self) -> x509.Certificate:
        """The root's certificate."""
        return certificate(
            *(ROOT, ROOT, self.root_key, self.root_key, self.root_period, 10, True),
            path_length=self.root_path_length,
        )

    @functools.cached_property
    def ca(self) -> x509.Certificate:
        """The certificate of the authority that issues PCK certificates."""
        return certificate(
            *(self.ca_name, ROOT, self.ca_key, self.root_key, self.ca_period, CA_SERIAL),
            self.ca_is_ca,
            algorithm=self.ca_algorithm,
        )

    @functools.cached_property
    def pck(self) -> x509.Certificate:
        """The platform's certificate."""
        extension = self.extension
        if extension is None:
            extension = sgx_extension(self.fmspc, self.components, self.pce_svn)
        return certificate(
            *(self.pck_name, self.ca_name, self.pck_key, self.ca_key, self.pck_period, PCK_SERIAL),
            self.pck_is_ca,
            extension,
            critical=self.extension_is_critical,
            may_sign=self.pck_may_sign,
        )

    @functools.cached_property
    def signer(self) -> x509.Certificate:
        """The certificate of whoever signs TCB info and QE identity."""
        return certificate(
            *(self.signer_name, ROOT, self.signer_key, self.root_key, self.signer_period),
            SIGNER_SERIAL,
            False,
        )

    @property
    def root_der(self) -> bytes:
        """The root's certificate, DER."""
        return self.root.public_bytes(Encoding.DER)

    @property
    def root_sha256(self) -> bytes:
        """What a verifier pins."""
        return hashlib.sha256(self.root_der).digest()

    @property
    def pck_chain(self) -> bytes:
        """PCK certificate, CA and root, PEM."""
        chain = (self.pck, self.ca, self.root)
        return b"".join(c.public_bytes(Encoding.PEM) for c in chain)

    def crl(self, issuer: str, signing: Key, revoked: tuple[int, ...]) -> bytes:
        """A revocation list, DER."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(name(issuer))
            .last_update(self.crl_period[0])
            .next_update(self.crl_period[1])
            # dcap-qvl asks for both, as RFC 5280, 5.2, does.
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()),
                critical=False,
            )
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder(serial, NOW - 2 * DAY)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(signing, hashes.SHA256()).public_bytes(Encoding.DER)

    def document(self, **fields: Any) -> tuple[str, str]:
        """A signed JSON document and its signature, hex."""
        start, end = (f"{t:%Y-%m-%dT%H:%M:%SZ}" for t in self.document_period)
        whole = {"issueDate": start, "nextUpdate": end, "tcbEvaluationDataNumber": 17, **fields}
        text = json.dumps(whole, separators=(",", ":"))
        return text, raw_signature(self.signer_key, text.encode()).hex()

    @functools.cached_property
    def collateral_json(self) -> str:
        """Collateral in the form of `dcap_qvl.QuoteCollateralV3.from_json`."""
        levels = {
            "id": "SGX",
            "version": 3,
            "fmspc": (self.fmspc if self.tcb_fmspc is None else self.tcb_fmspc).hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbLevels": self.levels,
        }
        tcb_info, tcb_signature = self.document(**{**levels, **dict(self.tcb_info_changes)})
        identity = {
            "id": "QE",
            "version": 2,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15,
            "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
            "mrsigner": QE_MRSIGNER.hex().upper(),
            "isvprodid": 1,
            "tcbLevels": self.qe_levels,
        }
        qe_identity, qe_signature = self.document(**{**identity, **dict(self.qe_identity_changes)})
        signers = b"".join(c.public_bytes(Encoding.PEM) for c in (self.signer, self.root))
        issuers = b"".join(c.public_bytes(Encoding.PEM) for c in (self.ca, self.root))
        return json.dumps(
            {
                "pck_crl_issuer_chain": issuers.decode(),
                "root_ca_crl": self.crl(
                    ROOT, self.root_crl_key or self.root_key, self.revoked_by_root
                ).hex(),
                "pck_crl": self.crl(
                    self.ca_name, self.pck_crl_key or self.ca_key, self.revoked_by_ca
                ).hex(),
                "tcb_info_issuer_chain": signers.decode(),
                "tcb_info": tcb_info,
                "tcb_info_signature": tcb_signature,
                "qe_identity_issuer_chain": signers.decode(),
                "qe_identity": qe_identity,
                "qe_identity_signature": qe_signature,
            }
        )

    @functools.cached_property
    def quote(self) -> bytes:
        """A quote of the enclave."""
        header = struct.pack("<HHI HH 16s 20s", 3, 2, 0, 8, PCE_SVN, INTEL_QE_VENDOR, b"\x2f" * 20)
        signed = header + report(
            *(self.mrenclave, self.mrsigner, self.product_id, self.svn),
            *(self.attributes, self.report_data),
        )
        bound = raw_point(self.bound_key or self.attestation_key)
        digest = hashlib.sha256(bound + self.qe_auth_data).digest()
        qe_report = report(
            *(b"\x96" * 32, self.qe_mrsigner, self.qe_product_id, self.qe_svn),
            *(self.qe_attributes, digest + bytes(32)),
        )
        chain = (self.pck_chain if self.chain is None else self.chain) + self.chain_ending
        body = b"".join(
            (
                raw_signature(self.attestation_key, signed),
                raw_point(self.attestation_key),
                qe_report,
                raw_signature(self.pck_key, qe_report),
                struct.pack("<H", len(self.qe_auth_data)),
                self.qe_auth_data,
                struct.pack("<HI", 5, len(chain)),
                chain,
            )
        )
        return signed + struct.pack("<I", len(body)) + body
