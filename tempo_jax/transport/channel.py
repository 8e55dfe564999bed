"""The client's line to an enclave on another machine: TLS 1.3 with evidence.

Trusted: it runs on the client's machine. Nothing is sent before the enclave's evidence was
verified: the nonce goes out as TLS server name, the certificate that comes back carries evidence
for its key and that nonce, and only then does the client give or prove the secret of the session.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import itertools
import secrets
import socket
import ssl
import threading
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from enclave_runtime.crypto.encryption import SessionKeys, session_keys
from enclave_runtime.protocol import handshake, wire
from enclave_runtime.protocol.configuration import Listen
from enclave_runtime.protocol.wire import Frame, Kind, WireError
from tempo_jax.attestation import certificates
from tempo_jax.attestation.policy import AttestationPolicy, Verified, verify_evidence
from tempo_jax.errors import (
    AttestationError,
    ChannelError,
    EnclaveDiedError,
    EnclaveError,
    UnsupportedError,
)
from tempo_jax.transport.identity import ClientIdentity
from tempo_jax.transport.loopback import fields_of
from tempo_jax.transport.ownership import Owned

CONNECT_SECONDS = 30.0
GREETING_BYTES = 1024


class Certificate(NamedTuple):
    """What an enclave showed in a handshake; nothing of it is verified.

    Attributes:
      public_key: SubjectPublicKeyInfo of the channel's key, DER.
      evidence: of the extension.
      nonce: the one the client sent.
    """

    public_key: bytes
    evidence: bytes
    nonce: bytes


def parse_address(address: str) -> tuple[str, int]:
    """Splits ``host:port``; an IPv6 address stands in brackets.

    Raises:
      ChannelError: it is not of this form.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ChannelError(f"{address!r} is no address; expected HOST:PORT, such as 10.0.0.5:7441")
    return host, int(port)


def parse_listen(address: str | None) -> Listen | None:
    """What ``host:port`` says of where an enclave listens; port 0 is any free one.

    Raises:
      ChannelError: it is not of this form, or the host is a name.
    """
    if address is None:
        return None
    host, port = parse_address(address)
    try:
        return Listen(str(ipaddress.ip_address(host)), port)
    except ValueError:
        raise ChannelError(
            f"an enclave listens on a numeric address, such as 0.0.0.0:7443, and not on {host!r}"
        ) from None


def dial(address: str) -> tuple[ssl.SSLSocket, Certificate]:
    """Makes a TLS connection with a fresh nonce and reads the enclave's certificate.

    The caller has to verify the certificate before it sends anything.

    Raises:
      ChannelError: nothing answers, or it does not speak TLS 1.3.
      AttestationError: the certificate is malformed or not signed by its own key.
    """
    target = parse_address(address)
    nonce = secrets.token_bytes(wire.NONCE_BYTES)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # No authority vouches for the certificate; the evidence in it does, and the caller verifies it.
    # A context serves one handshake, so that none resumes an earlier session without evidence.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        plain = socket.create_connection(target, CONNECT_SECONDS)
    except OSError as error:
        raise ChannelError(f"nothing answers at {address}: {error.strerror or error}") from error
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = context.wrap_socket(plain, server_hostname=handshake.server_name(nonce))
    except OSError as error:
        plain.close()
        raise ChannelError(
            f"what answers at {address} did not complete a TLS 1.3 handshake; is it the enclave's "
            "client port?"
        ) from error
    try:
        return connection, _read(connection.getpeercert(binary_form=True), nonce)
    except BaseException:
        connection.close()
        raise


def _read(encoded: bytes | None, nonce: bytes) -> Certificate:
    try:
        certificate = x509.load_der_x509_certificate(encoded or b"")
        certificate.verify_directly_issued_by(certificate)
        identifier = x509.ObjectIdentifier(handshake.EVIDENCE_OID)
        extension = certificate.extensions.get_extension_for_oid(identifier).value
        public_key = certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except (*certificates.MALFORMED, InvalidSignature) as error:
        raise AttestationError(
            "the certificate of the channel is not one that an enclave makes: self-signed, with "
            "evidence in it"
        ) from error
    assert isinstance(extension, x509.UnrecognizedExtension)
    return Certificate(public_key, extension.value, nonce)


class Channel(Owned):
    """A client's connection to an enclave that it has verified and owns.

    Attributes:
      session: the session's public name.
      keys: the session's keys.
      verified: what the evidence proved.
      identity: who the client is.
      closed: whether `close` was called.
    """

    def __init__(self, address: str, policy: AttestationPolicy, identity: ClientIdentity):
        """Connects, verifies, and owns the enclave or comes back to it.

        Raises:
          AttestationError: the evidence does not satisfy the policy.
          ChannelError: nothing answers, or the enclave has another owner.
        """
        self._address = address
        self.identity = identity
        self._lock = threading.Lock()
        self._requests = itertools.count(1)
        self.closed = False
        self._connection, certificate = dial(address)
        super().__init__()
        try:
            self.verified: Verified = verify_evidence(
                certificate.evidence,
                public_key_der=certificate.public_key,
                nonce=certificate.nonce,
                configuration=handshake.CONFIGURATION,
                policy=policy,
                now=datetime.datetime.now(datetime.UTC),
            )
            self.session, self.keys = self._prove(identity, certificate.public_key)
            self._connection.settimeout(None)
        except BaseException:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return self._address

    def leave_to_parent(self) -> None:
        """Closes a forked child's copy; see `Owned`."""
        self._connection.close()

    def _prove(self, identity: ClientIdentity, public_key: bytes) -> tuple[str, SessionKeys]:
        own, theirs = (handshake.proof_role(r, public_key) for r in ("client", "enclave"))
        owned = False
        try:
            greeting = wire.receive(self._connection, GREETING_BYTES).fields
            session, owned = str(greeting["session"]), greeting["owned"] is True
            challenge = bytes.fromhex(greeting["challenge"])
            secret = identity.session_secret(session, public_key)
            keys = session_keys(secret)
            if not owned:
                wire.send(self._connection, Frame(Kind.OWN, 0, {}, secret))
            nonce = secrets.token_bytes(wire.NONCE_BYTES)
            proof = wire.prove(keys.connection, own, challenge, nonce)
            fields = {"nonce": nonce.hex(), "proof": proof.hex()}
            wire.send(self._connection, Frame(Kind.PROOF, 0, fields))
            answer = fields_of(wire.receive(self._connection, GREETING_BYTES))["proof"]
            wire.check_proof(keys.connection, theirs, nonce, challenge, bytes.fromhex(answer))
        except (OSError, WireError, KeyError, TypeError, ValueError) as error:
            why = (
                "it has an owner already, whose identity is not this one. Pass the `identity` with "
                "which it was first connected to, or serve a new enclave"
                if owned
                else "somebody else may have come first"
            )
            raise ChannelError(
                f"the enclave at {self._address} refused this client: {why}"
            ) from error
        return session, keys

    def exchange(self, kind: Kind, fields: dict[str, Any], attachment: bytes = b"") -> Frame:
        """Asks the enclave and returns the reply with its attachment.

        Raises:
          EnclaveDiedError: the connection broke.
          ForkedError: this is a forked child of the process that connected.
          EnclaveError: the enclave refused.
          UnsupportedError: the request is too long for one frame.
        """
        self.check_process()
        self.check_open()
        with self._lock:
            number = next(self._requests)
            try:
                request = Frame(kind, number, fields, attachment).encode()
            except WireError as error:
                raise UnsupportedError(
                    f"{error}: pass large closed-over arrays as arguments, and split large values"
                ) from error
            try:
                self._connection.sendall(request)
                reply = wire.receive(self._connection)
                if reply.request != number:
                    raise WireError("a reply answers another request")
            except BaseException as error:
                # Whatever interrupted it, a late reply must not answer the next request.
                self._connection.close()
                if not isinstance(error, (OSError, WireError, ValueError)):
                    raise
                raise EnclaveDiedError(
                    f"the connection to the enclave at {self._address} broke; connect again with "
                    "the same identity. If its process ended, what it held is lost."
                ) from error
        fields_of(reply)
        return reply

    def request(self, kind: Kind, fields: dict[str, Any], attachment: bytes = b"") -> Any:
        """Asks the enclave and returns the reply's fields; see `exchange`."""
        return self.exchange(kind, fields, attachment).fields

    def check_open(self) -> None:
        """Refuses use after `close`.

        Raises:
          EnclaveError: it was closed.
        """
        if self.closed:
            raise EnclaveError("this connection was closed; connect again with the same identity")

    def close(self) -> None:
        """Leaves; the enclave goes on, and the same identity may come back.

        A forked child leaves its parent's connection as it is.
        """
        if not self.is_owned:
            return
        self.closed = True
        with contextlib.suppress(OSError):
            self._connection.close()
