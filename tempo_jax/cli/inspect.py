"""What an enclave is and what it would prove, for someone who does not trust it yet.

Connects like a client and stops before owning anything: nothing is sent after the handshake.
Nothing shown here is verified against a policy; `Enclave.connect` does that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from pathlib import Path

from enclave_runtime.protocol import handshake, wire
from enclave_runtime.protocol.evidence import Evidence, EvidenceError, decode_evidence, report_data
from enclave_runtime.protocol.wire import WireError
from tempo_jax.attestation.quote import parse_quote
from tempo_jax.errors import AttestationError, ChannelError
from tempo_jax.transport.channel import GREETING_BYTES, dial
from tempo_jax.transport.launch import SIGNATURE

_SIGSTRUCT_BYTES = 1808
_SIGSTRUCT_HEADER = bytes.fromhex("06000000e10000000000010000000000")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What an enclave says of itself.

    Attributes:
      address: of its client port.
      platform: what it runs on, by its own word.
      session: public name of its session.
      owned: whether a client owns it.
      key_sha256: of its channel's public key, hex.
      bound: whether its evidence was made for this key and handshake.
      measurement: what its quote says: name and value, in reading order; empty without one.
      signed_build: what the signature beside the build that was started says, alike; empty without.
    """

    address: str
    platform: str
    session: str
    owned: bool
    key_sha256: str
    bound: bool
    measurement: dict[str, str | int | bool]
    signed_build: dict[str, str | int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = {
            "address": self.address,
            "platform": self.platform,
            "session": f"{self.session}, {'owned by a client' if self.owned else 'without owner'}",
            "channel key": f"SHA-256 {self.key_sha256}",
            **self.measurement,
            **{f"signed {name}": value for name, value in self.signed_build.items()},
        }
        width = max(map(len, lines)) + 2
        shown = "\n".join(f"{name:<{width}}{value}" for name, value in lines.items())
        return f"{shown}\n\n{self.verdict}"

    @property
    def verdict(self) -> str:
        """What a client could conclude, in a sentence."""
        if not self.bound:
            return "Its evidence was made for another key or handshake: do not connect."
        if not self.measurement:
            return (
                "It shows no SGX quote and proves nothing: it may be any program of anyone. "
                "Clients refuse it, except under `AttestationPolicy(insecure_accept_no_sgx=True)`."
            )
        if self.measurement["debug"]:
            return "It runs in DEBUG mode, in which the host reads its memory: clients refuse it."
        return (
            "Its quote names this measurement for this channel. Compare it with the measurement of "
            "your own build, and pass it with the platform's collateral in an `AttestationPolicy`; "
            "signatures and TCB status are verified only then."
        )


def inspect(address: str) -> Inspection:
    """Asks an enclave for evidence and reads it, without a policy.

    Raises:
      ChannelError: nothing answers there that speaks the protocol.
      AttestationError: its certificate or its evidence is malformed.
    """
    connection, certificate = dial(address)
    with connection:
        try:
            greeting = wire.receive(connection, GREETING_BYTES).fields
            session, owned = str(greeting["session"]), greeting["owned"] is True
        except (OSError, WireError, KeyError) as error:
            raise ChannelError(f"what answers at {address} is not an enclave") from error
    try:
        evidence = decode_evidence(certificate.evidence)
    except EvidenceError as error:
        raise AttestationError(f"the enclave's evidence does not do: {error}") from error
    measurement, data = _measurement(evidence)
    expected = report_data(certificate.public_key, certificate.nonce, handshake.CONFIGURATION)
    return Inspection(
        address,
        evidence.platform,
        session,
        owned,
        hashlib.sha256(certificate.public_key).hexdigest(),
        data == expected,
        measurement,
    )


def signed_build(directory: Path) -> dict[str, str | int]:
    """What the signature of a built folder says of the enclave: name and value.

    The layout is Intel's SIGSTRUCT (SDM, volume 3D, "Enclave Signature Structure"). Nothing is
    verified: whoever built the folder knows what it signed.

    Returns:
      Empty if the folder is not signed.

    Raises:
      AttestationError: what lies there is no signature.
    """
    path = directory / SIGNATURE
    if not path.exists():
        return {}
    content = path.read_bytes()
    if len(content) != _SIGSTRUCT_BYTES or content[:16] != _SIGSTRUCT_HEADER:
        raise AttestationError(f"{path} is not the signature of an enclave")
    product_id, svn = struct.unpack_from("<HH", content, 1024)
    return {
        "mrenclave": content[960:992].hex(),
        "mrsigner": hashlib.sha256(content[128:512]).hexdigest(),
        "product_id": product_id,
        "svn": svn,
    }


def _measurement(evidence: Evidence) -> tuple[dict[str, str | int | bool], bytes]:
    """What a quote says of the enclave, and its report data."""
    if evidence.insecure:
        return {}, evidence.report_data
    report = parse_quote(evidence.quote).report
    shown: dict[str, str | int | bool] = {
        "mrenclave": report.mrenclave.hex(),
        "mrsigner": report.mrsigner.hex(),
        "product_id": report.product_id,
        "svn": report.svn,
        "debug": report.debug,
    }
    return shown, report.report_data
