"""Intel's extension of a PCK certificate: which platform it is for, and how new that is.

Runs on the client. The certificate is verified before it is read here, yet every length is checked.
`attestation.tcb` compares what is found with Intel's TCB info.

References:
  Intel SGX PCK Certificate and Certificate Revocation List Profile Specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cryptography import x509

from tempo_jax.attestation.certificates import MALFORMED
from tempo_jax.errors import AttestationError

_SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
_SGX_ARC = bytes.fromhex("2a864886f84d010d01")  # the same identifier's DER content


@dataclasses.dataclass(frozen=True)
class SGXPlatform:
    """What a PCK certificate says of the platform, from Intel's own extension.

    Attributes:
      fmspc: family, model, stepping, platform type and custom SKU; 6 bytes.
      pce_id: identifies the provisioning certification enclave; 2 bytes.
      components: the 16 security version numbers of the platform's TCB.
      pce_svn: security version number of the provisioning certification enclave.
    """

    fmspc: bytes
    pce_id: bytes
    components: tuple[int, ...]
    pce_svn: int


def platform_of(pck: x509.Certificate) -> SGXPlatform:
    """Reads Intel's extension of a PCK certificate.

    Raises:
      AttestationError: it is missing or malformed.
    """
    try:
        extension = pck.extensions.get_extension_for_oid(_SGX_EXTENSION).value
    except MALFORMED as error:
        raise AttestationError("a PCK certificate lacks Intel's SGX extension") from error
    if not isinstance(extension, x509.UnrecognizedExtension):
        raise AttestationError("a PCK certificate lacks Intel's SGX extension")
    return read_extension(extension.value)


def read_extension(content: bytes) -> SGXPlatform:
    """Reads the content of Intel's extension, DER.

      SEQUENCE OF SEQUENCE { identifier, value }, identifiers under 1.2.840.113741.1.13.1:
        .2  SEQUENCE OF the same: .2.1 to .2.16 INTEGER, .2.17 INTEGER (PCE SVN)
        .3  OCTET STRING (PCE ID, 2 bytes)        .4  OCTET STRING (FMSPC, 6 bytes)

    Raises:
      AttestationError: malformed, or a field is missing or doubled.
    """
    fields = _read_fields(content, _SGX_ARC)
    tcb = _read_fields(_expect(fields, 2, _SEQUENCE, whole=True), _SGX_ARC + b"\x02")
    svns = [int.from_bytes(_expect(tcb, n, _INTEGER), "big", signed=True) for n in range(1, 18)]
    if not all(0 <= svn <= 0xFF for svn in svns[:16]) or not 0 <= svns[16] <= 0xFFFF:
        raise AttestationError("a security version number of a PCK certificate is out of range")
    pce_id, fmspc = _expect(fields, 3, _OCTETS), _expect(fields, 4, _OCTETS)
    if (len(pce_id), len(fmspc)) != (2, 6):
        raise AttestationError("a PCK certificate's PCE ID or FMSPC has the wrong length")
    return SGXPlatform(fmspc, pce_id, tuple(svns[:16]), svns[16])


# DER, as far as that extension needs it: single-byte tags and definite lengths (X.690, 10.1).

_INTEGER, _OCTETS, _IDENTIFIER, _SEQUENCE = 0x02, 0x04, 0x06, 0x30


def _read_elements(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yields (tag, content, whole element) of elements that stand one behind the other."""
    position = 0
    while position < len(content):
        start = position
        header = content[position : position + 2]
        if len(header) < 2:
            raise AttestationError("an SGX extension is cut off")
        tag, length = header
        position += 2
        if length >= 0x80:
            count = length - 0x80
            length = int.from_bytes(content[position : position + count], "big")
            # The shortest form is the only one; two bytes are more than the extension needs.
            if count not in (1, 2) or length < (0x80 if count == 1 else 0x100):
                raise AttestationError("an SGX extension is not DER")
            position += count
        end = position + length
        if end > len(content):
            raise AttestationError("an SGX extension is cut off")
        yield tag, content[position:end], content[start:end]
        position = end


def _read_fields(content: bytes, arc: bytes) -> dict[int, tuple[int, bytes, bytes]]:
    """Maps the last part of each identifier under `arc` to its element."""
    elements = list(_read_elements(content))
    if len(elements) != 1 or elements[0][0] != _SEQUENCE:
        raise AttestationError("an SGX extension is not a sequence")
    fields: dict[int, tuple[int, bytes, bytes]] = {}
    for tag, pair, _ in _read_elements(elements[0][1]):
        parts = list(_read_elements(pair)) if tag == _SEQUENCE else []
        if len(parts) != 2 or parts[0][0] != _IDENTIFIER:
            raise AttestationError("an SGX extension is not a sequence of named values")
        identifier = parts[0][1]
        if identifier[:-1] != arc or identifier[-1] in fields:
            raise AttestationError("an SGX extension names a foreign field, or one twice")
        fields[identifier[-1]] = parts[1]
    return fields


def _expect(
    fields: dict[int, tuple[int, bytes, bytes]], number: int, tag: int, whole: bool = False
) -> bytes:
    found = fields.get(number)
    if found is None or found[0] != tag or not found[1]:
        raise AttestationError("an SGX extension lacks a field or has it with another type")
    return found[2] if whole else found[1]
