"""What the enclave shows about itself: an SGX quote, or words that say it has none.

Shared by the enclave, which makes evidence for the key of its channel, and the client,
which decodes it (`tempo_jax.attestation.policy` verifies it). Holds no secret. On SGX the report
data of the quote binds the channel's public key, the protocol version, the client's nonce and
the configuration, so that a quote serves one handshake with one key and no other. Without
SGX there is nothing that a stranger could check: the evidence says `insecure`, and a client
takes it only when it asked for that by name.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Literal

from enclave_runtime.protocol import wire
from enclave_runtime.protocol.wire import NONCE_BYTES

Platform = Literal["process", "gramine-direct", "gramine-sgx"]

FORMAT = "tempo_jax/evidence/1"
REPORT_DATA_BYTES = 64
CONFIGURATION_BYTES = 32
MAX_QUOTE = 1 << 16  # bytes; quotes with a PCK chain have about 4,600
MAX_EVIDENCE = 1 << 17  # bytes

_ATTESTATION_FOLDER = "/dev/attestation"  # Gramine's pseudo-files
_DOMAIN = b"tempo_jax/report data"
# The pseudo-files keep state between the write and the read and are not thread-safe.
_attestation_lock = threading.Lock()


class EvidenceError(Exception):
    """Evidence that cannot be made here, or that does not follow the format."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Decoded and not yet verified.

    Attributes:
      platform: what the enclave says it runs on.
      quote: the SGX quote; empty where the platform has none.
      report_data: what an enclave without a quote says it is bound to; empty where a quote
        says so. Unauthenticated: it uncovers mistakes, not attacks.
    """

    platform: Platform
    quote: bytes = b""
    report_data: bytes = b""

    @property
    def insecure(self) -> bool:
        """Whether nothing here can be verified."""
        return not self.quote


def configuration_hash(settings: Mapping[str, str | int | bool | None]) -> bytes:
    """SHA-256 of settings that both ends must agree on, as canonical JSON; 32 bytes.

    >>> configuration_hash({"a": 1, "b": "x"}) == configuration_hash({"b": "x", "a": 1})
    True
    """
    text = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).digest()


def report_data(public_key_der: bytes, nonce: bytes, configuration: bytes) -> bytes:
    """SHA-512 over (domain, version, key, nonce, configuration), each with its length in front.

    Args:
      public_key_der: SubjectPublicKeyInfo, DER, of the channel's key, which was made inside.
      nonce: `NONCE_BYTES` fresh random bytes of the client.
      configuration: what `configuration_hash` gave.

    Returns:
      `REPORT_DATA_BYTES` bytes: SHA-512 fills the field exactly.

    Raises:
      EvidenceError: an argument has the wrong length.
    """
    if not public_key_der:
        raise EvidenceError("a channel's public key is empty")
    if len(nonce) != NONCE_BYTES:
        raise EvidenceError(f"a nonce has {len(nonce)} bytes, expected {NONCE_BYTES}")
    if len(configuration) != CONFIGURATION_BYTES:
        raise EvidenceError(
            f"a configuration hash has {len(configuration)} bytes, expected {CONFIGURATION_BYTES}"
        )
    digest = hashlib.sha512()
    version = wire.VERSION.to_bytes(2, "big")
    # With the lengths no two different tuples of fields give the same bytes.
    for field in (_DOMAIN, version, public_key_der, nonce, configuration):
        digest.update(len(field).to_bytes(4, "big"))
        digest.update(field)
    return digest.digest()


def detect_platform() -> Platform:
    """What this process runs on, by the pseudo-files that Gramine provides.

    Only code whose measurement was checked gives a trustworthy answer; the quote tells the
    client, this tells the enclave what to offer.
    """
    if not os.path.isdir(_ATTESTATION_FOLDER):
        return "process"
    # gramine-direct shows the folder with an empty `keys` in it and nothing else.
    if not os.path.exists(os.path.join(_ATTESTATION_FOLDER, "report")):
        return "gramine-direct"
    return "gramine-sgx"


def _quote(data: bytes) -> bytes:
    """The quoting enclave's signature over this enclave's report with `data` in it."""
    try:
        with _attestation_lock:
            with open(os.path.join(_ATTESTATION_FOLDER, "user_report_data"), "wb") as file:
                file.write(data)
            with open(os.path.join(_ATTESTATION_FOLDER, "quote"), "rb") as file:
                quote = file.read(MAX_QUOTE + 1)
    except OSError as error:
        raise EvidenceError(
            'SGX gave no quote: the manifest needs `sgx.remote_attestation = "dcap"`, and the '
            "machine a running AESM service with the DCAP quote provider"
        ) from error
    if not 0 < len(quote) <= MAX_QUOTE:
        raise EvidenceError(f"a quote of {len(quote)} bytes, expected 1 to {MAX_QUOTE}")
    return quote


def make_evidence(public_key_der: bytes, nonce: bytes, configuration: bytes) -> bytes:
    """Evidence for one handshake, as JSON.

    Args:
      public_key_der: see `report_data`.
      nonce: the client's.
      configuration: what `configuration_hash` gave.

    Raises:
      EvidenceError: an argument has the wrong length, or the machine gave no quote. On SGX
        there is no way back to evidence without one.
    """
    data = report_data(public_key_der, nonce, configuration)
    platform = detect_platform()
    fields: dict[str, object] = {"format": FORMAT, "platform": platform}
    if platform == "gramine-sgx":
        fields["quote"] = base64.b64encode(_quote(data)).decode("ascii")
    else:
        fields["insecure"] = True
        fields["report_data"] = data.hex()
    return json.dumps(fields, separators=(",", ":")).encode()


def decode_evidence(encoded: bytes) -> Evidence:
    """Reads what `make_evidence` wrote; verifies nothing.

    Raises:
      EvidenceError: it is too long or does not follow the format.
    """
    if len(encoded) > MAX_EVIDENCE:
        raise EvidenceError(f"evidence of {len(encoded)} bytes, expected at most {MAX_EVIDENCE}")
    try:
        fields = json.loads(str(encoded, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise EvidenceError("evidence does not parse as JSON") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise EvidenceError(f"evidence is not of the format {FORMAT}: update both sides")
    platform = fields.get("platform")
    if platform not in ("process", "gramine-direct", "gramine-sgx"):
        raise EvidenceError("evidence names an unknown platform")
    if platform != "gramine-sgx":
        if fields.keys() != {"format", "platform", "insecure", "report_data"}:
            raise EvidenceError("evidence without a quote has other fields than it should")
        data = _decoded(fields["report_data"], "report data", bytes.fromhex)
        if fields["insecure"] is not True or len(data) != REPORT_DATA_BYTES:
            raise EvidenceError("evidence without a quote does not say what it is bound to")
        return Evidence(platform, report_data=data)
    if fields.keys() != {"format", "platform", "quote"}:
        raise EvidenceError("evidence with a quote has other fields than it should")
    quote = _decoded(fields["quote"], "a quote", lambda t: base64.b64decode(t, validate=True))
    if not 0 < len(quote) <= MAX_QUOTE:
        raise EvidenceError(f"a quote of {len(quote)} bytes, expected 1 to {MAX_QUOTE}")
    return Evidence(platform, quote=quote)


def _decoded(value: object, what: str, decode: Callable[[str], bytes]) -> bytes:
    if not isinstance(value, str):
        raise EvidenceError(f"{what} in evidence is not text")
    try:
        return decode(value)
    except ValueError as error:
        raise EvidenceError(f"{what} in evidence does not decode") from error
