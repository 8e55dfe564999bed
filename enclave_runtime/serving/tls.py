"""The enclave's end of the client's TLS channel: its key, certificates and contexts.

The key is made inside and never leaves: the one function of `ssl` that takes it reads files, so
it passes through a temporary file encrypted under a random password that only this process
knows. Each handshake gets a certificate of its own, whose evidence binds the key, the
configuration and the nonce that the client sent as server name.

TLS 1.3 only. No tickets are issued and no early data is taken, so that no connection can skip
the evidence. The client proves itself inside the channel, see `server`.
"""

from __future__ import annotations

import datetime
import logging
import secrets
import ssl
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from enclave_runtime.protocol import handshake
from enclave_runtime.protocol.evidence import make_evidence
from enclave_runtime.protocol.wire import WireError

_log = logging.getLogger("enclave_runtime")

# The evidence carries its own dates, and the enclave has no clock that it could trust.
_NOT_BEFORE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


class ServerIdentity:
    """A key made for this process, and what certifies it.

    Attributes:
      public_key: its SubjectPublicKeyInfo, DER.
    """

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.public_key = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def __repr__(self) -> str:
        return "ServerIdentity(<secret>)"

    def certificate(self, nonce: bytes) -> bytes:
        """A self-signed certificate, PEM, whose extension carries evidence for a nonce."""
        evidence = make_evidence(self.public_key, nonce, handshake.CONFIGURATION)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tempo_jax enclave")])
        identifier = x509.ObjectIdentifier(handshake.EVIDENCE_OID)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .add_extension(x509.UnrecognizedExtension(identifier, evidence), critical=False)
            .sign(self._key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    def context(self) -> ssl.SSLContext:
        """What the client port listens with; the certificate follows from the server name."""
        context = _bare_context()

        def answer(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
            try:
                connection.context = self._certified(handshake.nonce_of(name))
            except WireError as error:
                _log.warning("refused a handshake: %s", error)
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            except Exception:
                # It must not leave: `ssl` would print it.
                _log.exception("failed in a handshake")
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
            return None

        context.sni_callback = answer
        return context

    def _certified(self, nonce: bytes) -> ssl.SSLContext:
        context = _bare_context()
        password = secrets.token_hex(32).encode()
        key = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password),
        )
        # Only this user can read it, and it is gone at once; under Gramine /tmp is enclave memory.
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.certificate(nonce) + key)
            file.flush()
            context.load_cert_chain(file.name, password=password)
        return context


def _bare_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    return context
