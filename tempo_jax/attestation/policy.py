"""The client's policy: which enclave it takes, on what hardware, and on whose word.

Runs on the client, before it sends anything to an enclave that it did not launch. The channel
(`transport.channel`) hands over the evidence out of the peer's certificate; `verify_evidence`
returns only if an enclave that the policy names made the key of that very channel for this very
handshake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hmac

from enclave_runtime.protocol import evidence as _evidence
from enclave_runtime.protocol.evidence import EvidenceError, Platform
from tempo_jax.attestation import quote as quotes
from tempo_jax.attestation import tcb
from tempo_jax.attestation.certificates import INTEL_ROOT_SHA256
from tempo_jax.attestation.tcb import Collateral
from tempo_jax.errors import AttestationError

_MEASUREMENT_BYTES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttestationPolicy:
    """What evidence an enclave has to show.

    Name the enclave by `mrenclave`, the hash of its code and configuration, or by `mrsigner`
    together with `product_id` and `min_svn`, if whoever signs its releases is trusted with
    the data. Who names both gets both checked. Enclaves with the DEBUG attribute are always
    refused: their host can read their memory.

    >>> AttestationPolicy(mrsigner="ab" * 32)
    Traceback (most recent call last):
      ...
    tempo_jax.errors.AttestationError: AttestationPolicy: `mrsigner` alone admits everything \
that this key ever signed; give `product_id` and `min_svn` as well

    Attributes:
      mrenclave: measurement, 32 bytes or 64 hex digits.
      mrsigner: hash of the signer's key, 32 bytes or 64 hex digits.
      product_id: of the enclave; only with `mrsigner`, since who signs chooses it.
      min_svn: least security version number; only with `mrsigner`.
      accepted_tcb: statuses of the platform that will do, from `UpToDate`,
        `SWHardeningNeeded`, `ConfigurationNeeded`, `ConfigurationAndSWHardeningNeeded`,
        `OutOfDate`, `OutOfDateConfigurationNeeded`. Each but the first means that attacks on
        the platform are known; `Revoked` cannot be accepted.
      collateral: Intel's documents for the platform, which the client fetched itself.
      insecure_accept_no_sgx: takes an enclave that has no quote to show, which may be
        anything and anyone. For development, and never together with a named enclave: a host
        would only have to withhold the quote.

    Raises:
      AttestationError: the policy names no enclave, or contradicts itself.
    """

    mrenclave: bytes | str | None = None
    mrsigner: bytes | str | None = None
    product_id: int | None = None
    min_svn: int | None = None
    accepted_tcb: tuple[str, ...] = ("UpToDate",)
    collateral: Collateral | None = None
    insecure_accept_no_sgx: bool = False

    def __post_init__(self) -> None:
        for name in ("mrenclave", "mrsigner"):
            object.__setattr__(self, name, _measurement(getattr(self, name), name))
        for name in ("product_id", "min_svn"):
            number = getattr(self, name)
            if number is not None and (type(number) is not int or not 0 <= number <= 0xFFFF):
                raise AttestationError(f"AttestationPolicy: `{name}` is not between 0 and 65535")
        # A text such as "false" would be true.
        if type(self.insecure_accept_no_sgx) is not bool:
            raise AttestationError("AttestationPolicy: `insecure_accept_no_sgx` is True or False")
        if self.collateral is not None and not isinstance(self.collateral, Collateral):
            raise AttestationError(
                "AttestationPolicy: `collateral` is a `Collateral`; read JSON with "
                "`Collateral.from_json`"
            )
        if isinstance(self.accepted_tcb, str):
            raise AttestationError("AttestationPolicy: `accepted_tcb` is a tuple of statuses")
        object.__setattr__(self, "accepted_tcb", tuple(self.accepted_tcb))
        acceptable = [s for s in tcb.STATUSES if s != "Revoked"]
        if not self.accepted_tcb or not set(self.accepted_tcb) <= set(acceptable):
            raise AttestationError(
                f"AttestationPolicy: `accepted_tcb` takes one or more of {', '.join(acceptable)}"
            )
        signed = (self.product_id is not None, self.min_svn is not None)
        if self.mrsigner is None and any(signed):
            raise AttestationError(
                "AttestationPolicy: `product_id` and `min_svn` mean nothing without `mrsigner`, "
                "since anyone may sign an enclave with any of them"
            )
        if self.mrsigner is not None and self.mrenclave is None and not all(signed):
            raise AttestationError(
                "AttestationPolicy: `mrsigner` alone admits everything that this key ever "
                "signed; give `product_id` and `min_svn` as well"
            )
        if self.insecure_accept_no_sgx and (self.names_enclave or self.collateral is not None):
            raise AttestationError(
                "AttestationPolicy: `insecure_accept_no_sgx=True` takes an enclave that shows no "
                "quote, whatever else the policy asks for, so that a host would only have to "
                "withhold the quote. Leave it out to verify quotes, or use a policy with it alone "
                "to develop with data that is not secret"
            )
        if self.names_enclave:
            if self.collateral is None:
                raise AttestationError(
                    "AttestationPolicy: a quote cannot be verified without `collateral`; fetch it "
                    "for the enclave's platform and pass `Collateral.from_json(...)`"
                )
        elif not self.insecure_accept_no_sgx:
            raise AttestationError(
                "AttestationPolicy: name the enclave by `mrenclave`, or by `mrsigner`, "
                "`product_id` and `min_svn`; without SGX there is only "
                "`insecure_accept_no_sgx=True`"
            )

    @property
    def names_enclave(self) -> bool:
        """Whether there is an enclave that this policy takes on the strength of a quote."""
        return self.mrenclave is not None or self.mrsigner is not None


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was verified of an enclave; without a quote, nothing.

    Attributes:
      platform: what it runs on, by its own word unless there was a quote.
      insecure: whether it was taken without a quote.
      mrenclave: measurement, 32 bytes; with what follows empty where `insecure`.
      mrsigner: hash of the signer's key, 32 bytes.
      product_id: chosen by the signer.
      svn: security version number, chosen by the signer.
      tcb_status: Intel's word on the platform.
      advisories: Intel's security advisories that concern it.
    """

    platform: Platform
    insecure: bool
    mrenclave: bytes = b""
    mrsigner: bytes = b""
    product_id: int | None = None
    svn: int | None = None
    tcb_status: str = ""
    advisories: tuple[str, ...] = ()


def verify_evidence(
    evidence: bytes,
    *,
    public_key_der: bytes,
    nonce: bytes,
    configuration: bytes,
    policy: AttestationPolicy,
    now: datetime.datetime,
    insecure_root_sha256: bytes | None = None,
) -> Verified:
    """Verifies that an enclave of the policy made the channel's key for this handshake.

    Args:
      evidence: what the peer's certificate carries.
      public_key_der: SubjectPublicKeyInfo of the key that the peer proved to hold.
      nonce: the client's, drawn for this handshake.
      configuration: `configuration_hash` of what the client expects of the enclave.
      policy: what the client accepts.
      now: the time to verify at, with its zone.
      insecure_root_sha256: SHA-256 of another root than Intel's, for tests with a PKI of their
        own.

    Raises:
      AttestationError: anything does not hold. Nothing may be sent to such a peer.
    """
    if now.tzinfo is None:
        raise AttestationError("`now` has no time zone; pass `datetime.now(UTC)`")
    try:
        shown = _evidence.decode_evidence(evidence)
        expected = _evidence.report_data(public_key_der, nonce, configuration)
    except EvidenceError as error:
        raise AttestationError(f"the enclave's evidence does not do: {error}") from error
    if shown.insecure:
        return _accept_without_quote(shown, expected, policy)
    if not policy.names_enclave or policy.collateral is None:
        raise AttestationError(
            "the enclave shows a quote, but the policy says neither which enclave it takes nor "
            "the collateral: give `mrenclave` and `collateral`"
        )
    quote = quotes.parse_quote(shown.quote)
    root = INTEL_ROOT_SHA256 if insecure_root_sha256 is None else insecure_root_sha256
    status = quotes.verify_quote(quote, policy.collateral, now, root_sha256=root)
    # From here on the report is what the processor said; before, it is what the peer said.
    report = quote.report
    _check_enclave(report, policy)
    if status.name not in policy.accepted_tcb:
        raise AttestationError(
            f"the platform's TCB status is {status.name} ({', '.join(status.advisories)}); the "
            f"policy accepts {', '.join(policy.accepted_tcb)}: update the platform, or weigh the "
            "advisories and add the status to `accepted_tcb`"
        )
    _check_binding(report.report_data, expected)
    return Verified(
        platform=shown.platform,
        insecure=False,
        mrenclave=report.mrenclave,
        mrsigner=report.mrsigner,
        product_id=report.product_id,
        svn=report.svn,
        tcb_status=status.name,
        advisories=status.advisories,
    )


def _accept_without_quote(
    shown: _evidence.Evidence, expected: bytes, policy: AttestationPolicy
) -> Verified:
    if not policy.insecure_accept_no_sgx:
        raise AttestationError(
            f"the enclave runs on {shown.platform} and has no SGX quote to show, so it may be "
            "anything: run it with gramine-sgx, or, to develop with data that is not secret, "
            "pass `AttestationPolicy(insecure_accept_no_sgx=True)`"
        )
    _check_binding(shown.report_data, expected)
    return Verified(platform=shown.platform, insecure=True)


def _check_enclave(report: quotes.ReportBody, policy: AttestationPolicy) -> None:
    if report.debug:
        raise AttestationError(
            "the enclave runs in DEBUG mode, in which the host can read its memory: build it with "
            "`sgx.debug = false`"
        )
    for name, found in (("mrenclave", report.mrenclave), ("mrsigner", report.mrsigner)):
        wanted = getattr(policy, name)
        if wanted is not None and not hmac.compare_digest(found, wanted):
            raise AttestationError(
                f"the enclave's {name.upper()} is {found.hex()}, the policy asks for "
                f"{wanted.hex()}: it is another enclave or another version of it"
            )
    if policy.product_id is not None and report.product_id != policy.product_id:
        raise AttestationError(
            f"the enclave's product id is {report.product_id}, the policy asks for "
            f"{policy.product_id}"
        )
    if policy.min_svn is not None and report.svn < policy.min_svn:
        raise AttestationError(
            f"the enclave's security version is {report.svn}, the policy asks for at least "
            f"{policy.min_svn}: update the enclave"
        )


def _check_binding(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise AttestationError(
            "the evidence was made for another key, nonce, protocol version or configuration: it "
            "is replayed or relayed, or both sides run different releases"
        )


def _measurement(value: bytes | str | None, name: str) -> bytes | None:
    if value is None:
        return None
    content = b""
    if isinstance(value, bytes):
        content = value
    elif isinstance(value, str):
        with contextlib.suppress(ValueError):
            content = bytes.fromhex(value)
    if len(content) != _MEASUREMENT_BYTES:
        raise AttestationError(
            f"AttestationPolicy: `{name}` has {_MEASUREMENT_BYTES} bytes, or twice as many hex "
            "digits"
        )
    return content
