"""What both ends of the client's TLS channel agree on; holds no secret.

The client's nonce travels to the enclave as the TLS server name, so that the certificate
itself can carry evidence made for this very handshake, in an extension of its own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from enclave_runtime.protocol.evidence import configuration_hash
from enclave_runtime.protocol.wire import NONCE_BYTES, WireError

# An arc of our own needs no registry: 2.25 holds all UUIDs (ITU-T X.667, 7).
EVIDENCE_OID = "2.25.282462010756404170910583552749004773021"
_SUFFIX = ".tempo"
# What the evidence vouches for beyond the code: in this mode the secret of the session comes over
# the attested channel and from nowhere else.
CONFIGURATION = configuration_hash({"mode": "serve"})


def server_name(nonce: bytes) -> str:
    """The TLS server name that carries a nonce: base32 in lower case, and a suffix."""
    assert len(nonce) == NONCE_BYTES
    return base64.b32encode(nonce).decode().rstrip("=").lower() + _SUFFIX


def nonce_of(name: str | None) -> bytes:
    """Inverse of `server_name`.

    Raises:
      WireError: the name is absent or not of this form.
    """
    text = name.removesuffix(_SUFFIX) if name else ""
    try:
        padding = "=" * (-len(text) % 8)
        nonce = base64.b32decode(text.upper() + padding)
    except (binascii.Error, ValueError) as error:
        raise WireError("a TLS server name carries no nonce") from error
    if len(nonce) != NONCE_BYTES or server_name(nonce) != name:
        raise WireError("a TLS server name carries no nonce")
    return nonce


def proof_role(role: str, public_key_der: bytes) -> str:
    """The role that a proof over the channel names, bound to the enclave's TLS key.

    A proof made for one key is worthless to whoever holds another, also where the client was told
    to accept evidence that proves nothing.
    """
    return f"{role}|{hashlib.sha256(public_key_der).hexdigest()}"
