"""The channel is TLS 1.3, and a client verifies who answers before it sends anything."""

import contextlib
import datetime
import os
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import tempo_jax as tempo
from enclave_runtime.crypto.encryption import session_keys
from enclave_runtime.protocol import handshake, wire
from enclave_runtime.protocol.evidence import make_evidence
from enclave_runtime.protocol.wire import Frame, Kind, WireError
from enclave_runtime.serving import tls
from enclave_runtime.serving.tls import ServerIdentity
from tempo_jax.errors import (
    AttestationError,
    ChannelError,
)
from tempo_jax.transport import channel
from tempo_jax.transport.channel import Channel, dial, parse_address
from tempo_jax.transport.loopback import Attachment
from tests.support.ports import in_process, numbered, still_serves
from tests.support.serving import IDENTITY, INSECURE
from tests.support.toy_pki import der

DATA = Path(__file__).parent.parent / "data"

# The handshake


def test_channel_is_tls_1_3_and_resumes_nothing(enclave_ports):
    seen = set()
    for _ in range(2):
        connection, certificate = dial(enclave_ports.client)
        with connection:
            assert connection.version() == "TLSv1.3"
            wire.receive(connection)  # tickets would have come by now
            session = connection.session
            assert session is None or not session.has_ticket
        seen.add((certificate.public_key, certificate.evidence))
    (first, one), (second, other) = seen
    assert first == second and one != other, "one key, and evidence for each handshake"


def test_older_tls_is_refused(enclave_ports):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    name = handshake.server_name(bytes(32))
    with (
        socket.create_connection(parse_address(enclave_ports.client), 10) as plain,
        pytest.raises(ssl.SSLError, match="version|VERSION"),
    ):
        context.wrap_socket(plain, server_hostname=name)
    still_serves(enclave_ports)


NAMES = [None, "localhost", "enclave.example.org", f"{'a' * 52}.tempo", f"{'a' * 51}.tempo"]


@pytest.mark.parametrize(
    "name", [*NAMES[:3], NAMES[4], handshake.server_name(bytes(32)) + ".tempo"]
)
def test_handshake_without_a_nonce_is_refused(enclave_ports, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(parse_address(enclave_ports.client), 10) as plain,
        pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"),
    ):
        context.wrap_socket(plain, server_hostname=name)
    still_serves(enclave_ports)


def test_server_name_carries_the_nonce():
    nonce = os.urandom(32)
    assert handshake.nonce_of(handshake.server_name(nonce)) == nonce
    assert handshake.nonce_of(NAMES[3]) == bytes(32)
    for name in (*NAMES[:3], NAMES[4], handshake.server_name(nonce).upper(), "é.tempo", ""):
        with pytest.raises(WireError, match="carries no nonce"):
            handshake.nonce_of(name)


def test_plain_tcp_on_the_tls_port_is_refused(enclave_ports):
    for sent in (b"", numbered(1), bytes(64)):
        with socket.create_connection(parse_address(enclave_ports.client), 10) as connection:
            connection.sendall(sent)
            # At most an alert (RFC 8446, 6), and nothing of the enclave's.
            received = b""
            with contextlib.suppress(OSError):  # it may be gone already
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(64):
                    received += part
            assert received == b"" or received[0] == 21
    still_serves(enclave_ports)


def test_client_on_a_port_without_tls_is_told(enclave_ports, monkeypatch):
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 2.0)
    with pytest.raises(ChannelError, match=r"did not complete a TLS 1\.3 handshake"):
        Channel(enclave_ports.host, INSECURE, IDENTITY)
    with pytest.raises(ChannelError, match="nothing answers at 127.0.0.1:1: Connection refused"):
        Channel("127.0.0.1:1", INSECURE, IDENTITY)


@pytest.mark.parametrize("address", ["", "host", ":7441", "host:", "host:x", "host:-1", "h:65536"])
def test_address_without_a_port_is_refused(address):
    with pytest.raises(ChannelError, match="expected HOST:PORT"):
        parse_address(address)


def test_address_of_ipv6_stands_in_brackets():
    assert parse_address("[::1]:7441") == ("::1", 7441)


def test_key_is_never_in_a_file_in_the_clear(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loaded = []
    load = ssl.SSLContext.load_cert_chain

    def recording(context: ssl.SSLContext, name: str, **options: Any) -> None:
        loaded.append((Path(name).read_bytes(), os.stat(name).st_mode & 0o777))
        load(context, name, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", recording)
    identity = ServerIdentity()
    identity._certified(bytes(32))
    ((content, mode),) = loaded
    assert mode == 0o600
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in content and b"BEGIN PRIVATE KEY" not in content
    assert b"BEGIN EC PRIVATE KEY" not in content
    assert list(tmp_path.iterdir()) == []
    assert repr(identity) == "ServerIdentity(<secret>)"


# What a client refuses, before it sends anything


@contextlib.contextmanager
def impostor(
    certificate: Callable[[bytes], tuple[bytes, bytes]], session: str = "00" * 16
) -> Iterator[tuple[str, list]]:
    """A TLS server that shows what `certificate(nonce)` gives: certificate and key, PEM.

    It says that it is `session`. Gives its address and, once a client left, what that sent after
    the handshake.
    """
    received: list[bytes] = []
    context = tls._bare_context()

    def choose(connection: Any, name: str | None, _: Any) -> None:
        chosen = tls._bare_context()
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(certificate(handshake.nonce_of(name))))
            file.flush()
            chosen.load_cert_chain(file.name)
        connection.context = chosen

    context.sni_callback = choose

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, context.wrap_socket(connection, server_side=True) as secure:
            secure.settimeout(10)
            challenge = {"challenge": "00" * 32, "session": session, "owned": False}
            with contextlib.suppress(OSError):
                wire.send(secure, Frame(Kind.HELLO, 0, challenge))
                received.append(secure.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", received
        thread.join(20)


def certificate_with(
    extensions: dict[str, bytes],
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> x509.Certificate:
    """A certificate of `key`, with contents by object identifier; signs itself without `signer`."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "impostor")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC))
    )
    for arcs, content in extensions.items():
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(arcs), content)
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer or key, hashes.SHA256())


def forged(
    evidence: Callable[[bytes, bytes], bytes | None], signed_by_another: bool = False
) -> Callable[[bytes], tuple[bytes, bytes]]:
    """A certificate whose evidence is `evidence(public_key, nonce)`."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = ec.generate_private_key(ec.SECP256R1()) if signed_by_another else key
    public_key = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def make(nonce: bytes) -> tuple[bytes, bytes]:
        content = evidence(public_key, nonce)
        extensions = {} if content is None else {handshake.EVIDENCE_OID: content}
        certificate = certificate_with(extensions, key, signer)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return certificate.public_bytes(serialization.Encoding.PEM), private

    return make


FORGED: dict[str, tuple[Callable[[bytes], tuple[bytes, bytes]], str]] = {
    "another nonce": (
        forged(lambda key, nonce: make_evidence(key, nonce[::-1], handshake.CONFIGURATION)),
        "made for another key, nonce",
    ),
    "another key": (
        forged(lambda key, nonce: make_evidence(key[::-1], nonce, handshake.CONFIGURATION)),
        "made for another key, nonce",
    ),
    "another configuration": (
        forged(lambda key, nonce: make_evidence(key, nonce, handshake.CONFIGURATION[::-1])),
        "made for another key, nonce",
    ),
    "evidence of nothing": (forged(lambda key, nonce: b"{}"), "evidence does not do"),
    "no evidence": (forged(lambda key, nonce: None), "not one that an enclave makes"),
    "another signer": (
        forged(lambda k, n: make_evidence(k, n, handshake.CONFIGURATION), signed_by_another=True),
        "not one that an enclave makes",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_certificate_that_no_enclave_made_gets_nothing(name):
    certificate, text = FORGED[name]
    with impostor(certificate) as (address, received):
        with pytest.raises(AttestationError, match=text):
            Channel(address, INSECURE, IDENTITY)
    assert received in ([], [b""]), "the client sent something before it had verified"


# What `cryptography` raises on parts of a certificate, here with others of the same length.
ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
HOSTILE: dict[str, tuple[bytes, bytes, type[Exception]]] = {
    "version": (bytes.fromhex("a003020102"), bytes.fromhex("a003020104"), x509.InvalidVersion),
    "curve": (
        bytes.fromhex("06082a8648ce3d030107"),
        bytes.fromhex("06082a8648ce3d030155"),
        UnsupportedAlgorithm,
    ),
    "key's algorithm": (
        bytes.fromhex("06072a8648ce3d0201"),
        bytes.fromhex("06072a8648ce3d0255"),
        UnsupportedAlgorithm,
    ),
    "one extension twice": (
        bytes.fromhex("06032a0305"),
        bytes.fromhex("06032a0304"),
        x509.DuplicateExtension,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_certificate_that_cannot_be_read_is_refused(name):
    old, new, cause = HOSTILE[name]
    key = ec.generate_private_key(ec.SECP256R1())
    arcs = (handshake.EVIDENCE_OID, "1.2.3.4", "1.2.3.5")
    certificate = certificate_with(dict.fromkeys(arcs, b"{}"), key)

    def signed(content: bytes) -> bytes:
        # Signed again, so that the signature is not what is refused.
        signature = der(0x03, b"\0" + key.sign(content, ec.ECDSA(hashes.SHA256())))
        return der(0x30, content + ECDSA_WITH_SHA256 + signature)

    content = certificate.tbs_certificate_bytes
    assert content.count(old) == 1 and len(old) == len(new)
    assert channel._read(signed(content), b"").evidence == b"{}"
    with pytest.raises(AttestationError, match="not one that an enclave makes") as caught:
        channel._read(signed(content.replace(old, new)), b"")
    assert isinstance(caught.value.__cause__, cause)


def test_impostor_would_have_seen_what_a_client_sends():
    # The control of the test above: this one satisfies the (insecure) policy and gets the secret.
    honest = forged(lambda key, nonce: make_evidence(key, nonce, handshake.CONFIGURATION))
    with impostor(honest) as (address, received):
        with pytest.raises(ChannelError, match="refused this client"):
            Channel(address, INSECURE, IDENTITY)
    assert IDENTITY.session_secret("00" * 16, public_key_of(honest)) in received[0]


def public_key_of(certificate: Callable[[bytes], tuple[bytes, bytes]]) -> bytes:
    """The key of an impostor's certificates, DER."""
    shown, _ = certificate(bytes(32))
    return (
        x509.load_pem_x509_certificate(shown)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def test_peer_that_names_anothers_session_gets_another_secret(enclave_ports, client):
    # A session's name is public, and under this policy anyone's evidence will do.
    connection, certificate = dial(enclave_ports.client)
    connection.close()
    honest = forged(lambda key, nonce: make_evidence(key, nonce, handshake.CONFIGURATION))
    with impostor(honest, client.session) as (address, received):
        with pytest.raises(ChannelError, match="refused this client"):
            Channel(address, INSECURE, IDENTITY)
    owners = IDENTITY.session_secret(client.session, certificate.public_key)
    assert session_keys(owners) == client.keys
    assert owners not in received[0]
    assert IDENTITY.session_secret(client.session, public_key_of(honest)) in received[0]


def test_evidence_without_a_quote_is_refused_by_default(enclave_ports):
    collateral = tempo.Collateral.from_json((DATA / "sgx_quote_collateral.json").read_text())
    policy = tempo.AttestationPolicy(mrenclave=bytes(32), collateral=collateral)
    with pytest.raises(AttestationError, match="has no SGX quote to show"):
        tempo.Enclave.connect(enclave_ports.client, policy=policy, identity=IDENTITY)


@pytest.mark.parametrize("over_tls", [False, True])
def test_reflected_proof_does_not_pass_as_the_enclaves(over_tls):
    # A server without the key sends the peer's own proof back.
    def reflect(connection: socket.socket, deadline: float) -> Frame:
        fields = {"challenge": "00" * 32, "session": "00" * 16, "owned": True}
        wire.send(connection, Frame(Kind.HELLO, 0, fields))
        return wire.receive(connection, deadline=deadline)

    context = ServerIdentity().context() if over_tls else None
    with in_process(reflect, context) as port:
        with pytest.raises(ChannelError, match="refused this client|accepts this host") as caught:
            if over_tls:
                Channel(f"127.0.0.1:{port}", INSECURE, IDENTITY)
            else:
                Attachment(port, bytes(32))
        assert "does not know the session key" in str(caught.value.__cause__)
