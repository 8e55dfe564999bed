"""SGX quotes: the public sample, and every way in which a toy platform's quote can be wrong.

`dcap-qvl`, a verifier in Rust by others, judges the same quotes: what it refuses is refused here,
and the statuses agree.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import dcap_qvl
import hypothesis.strategies as st
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given

from tempo_jax.attestation import certificates as certificates_module
from tempo_jax.attestation import pck as pck_module
from tempo_jax.attestation import tcb
from tempo_jax.attestation.pck import SGXPlatform
from tempo_jax.attestation.quote import ReportBody, parse_quote, verify_quote
from tempo_jax.attestation.tcb import Collateral, Status
from tempo_jax.errors import AttestationError
from tests.support.quotes import COLLATERAL, TOY, patched, verify, verify_with_dcap_qvl
from tests.support.toy_pki import (
    CA_SERIAL,
    COMPONENTS,
    DAY,
    MRENCLAVE,
    MRSIGNER,
    NOW,
    PCE_SVN,
    PCK_SERIAL,
    PRODUCT_ID,
    SIGNER,
    SIGNER_SERIAL,
    SVN,
    Toy,
    der,
    key,
    level,
    tcb_level,
)

PAST = (NOW - 20 * DAY, NOW - 10 * DAY)
FUTURE = (NOW + 10 * DAY, NOW + 20 * DAY)
DATA = Path(__file__).parent.parent / "data"
SAMPLE = (DATA / "sgx_quote").read_bytes()
SAMPLE_COLLATERAL = (DATA / "sgx_quote_collateral.json").read_text()
SAMPLE_DATE = datetime.datetime(2025, 6, 20, tzinfo=datetime.UTC)

# The public sample


def test_public_sample_verifies_at_its_date():
    quote = parse_quote(SAMPLE)
    status = verify_quote(quote, Collateral.from_json(SAMPLE_COLLATERAL), SAMPLE_DATE)
    assert status == Status(
        "ConfigurationAndSWHardeningNeeded", ("INTEL-SA-00289", "INTEL-SA-00615")
    )
    assert quote.report.mrenclave.hex() == (
        "33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"
    )
    assert quote.report.mrsigner.hex() == (
        "815f42f11cf64430c30bab7816ba596a1da0130c3b028b673133a66cf9a3e0e6"
    )
    assert quote.report.report_data.rstrip(b"\0") == b"Hello, world!"
    assert not quote.report.debug


def test_public_sample_agrees_with_dcap_qvl():
    collateral = dcap_qvl.QuoteCollateralV3.from_json(SAMPLE_COLLATERAL)
    theirs = dcap_qvl.verify(SAMPLE, collateral, int(SAMPLE_DATE.timestamp()))
    ours = verify_quote(parse_quote(SAMPLE), Collateral.from_json(SAMPLE_COLLATERAL), SAMPLE_DATE)
    assert (theirs.status, tuple(theirs.advisory_ids)) == ours
    report: Any = dcap_qvl.parse_quote(SAMPLE).report
    assert report.mr_enclave == parse_quote(SAMPLE).report.mrenclave


def test_platform_of_public_sample_agrees_with_dcap_qvl():
    pck = x509.load_der_x509_certificate(parse_quote(SAMPLE).certificates[0])
    ours, theirs = pck_module.platform_of(pck), dcap_qvl.parse_quote(SAMPLE).pck_extension()
    assert theirs is not None
    assert ours == SGXPlatform(theirs.fmspc, theirs.pce_id, tuple(theirs.cpu_svn), theirs.pce_svn)


@pytest.mark.parametrize(
    ("date", "text"),
    [
        (datetime.datetime(2025, 6, 19, tzinfo=datetime.UTC), "TCB info is not valid before"),
        (datetime.datetime(2025, 7, 20, tzinfo=datetime.UTC), "TCB info expired on"),
        (datetime.datetime(2040, 1, 1, tzinfo=datetime.UTC), "certificate of the chain expired"),
    ],
)
def test_public_sample_at_another_date_is_refused(date, text):
    with pytest.raises(AttestationError, match=text):
        verify_quote(parse_quote(SAMPLE), Collateral.from_json(SAMPLE_COLLATERAL), date)


def test_pinned_root_is_in_the_public_sample():
    root = parse_quote(SAMPLE).certificates[2]
    assert hashlib.sha256(root).digest() == certificates_module.INTEL_ROOT_SHA256


def test_intel_root_is_pinned_unless_told_otherwise():
    with pytest.raises(AttestationError, match="does not end in the pinned root"):
        verify_quote(parse_quote(TOY.quote), COLLATERAL, NOW)


# The toy platform


def test_toy_quote_verifies():
    assert verify(TOY) == verify_with_dcap_qvl(TOY) == Status("UpToDate", ())
    assert parse_quote(TOY.quote).report == ReportBody(
        *(bytes(4), TOY.attributes, MRENCLAVE, MRSIGNER, PRODUCT_ID, SVN, TOY.report_data)
    )


@pytest.mark.parametrize("ending", [b"", b"\0", b"\n"])
def test_ending_of_the_chain_may_vary(ending):
    toy = Toy(chain_ending=ending)
    assert verify(toy).name == "UpToDate"


def test_platform_ca_may_issue():
    assert verify(Toy(ca_name="Intel SGX PCK Platform CA")).name == "UpToDate"


OTHER = Toy(root_key=key("other root"))
FORGED_CA = Toy(
    chain=b"".join(c.public_bytes(Encoding.PEM) for c in (OTHER.pck, OTHER.ca, TOY.root))
)
FORGED_PCK = Toy(
    chain=b"".join(
        c.public_bytes(Encoding.PEM) for c in (Toy(ca_key=key("other ca")).pck, TOY.ca, TOY.root)
    )
)
SHORT = Toy(chain=b"".join(c.public_bytes(Encoding.PEM) for c in (TOY.pck, TOY.ca)))
SWAPPED = Toy(chain=b"".join(c.public_bytes(Encoding.PEM) for c in (TOY.ca, TOY.pck, TOY.root)))
BY_SIGNER = Toy(
    chain=b"".join(c.public_bytes(Encoding.PEM) for c in (TOY.signer, TOY.ca, TOY.root))
)
DEBUG_QE = bytes([0x13, *(0,) * 7, 0xE7, *(0,) * 7])
REFUSALS: dict[str, tuple[Toy, str]] = {
    # Chain
    "other root": (OTHER, "does not end in the pinned root"),
    "forged CA": (FORGED_CA, "signature does not hold under its issuer's key"),
    "forged PCK": (FORGED_PCK, "signature does not hold under its issuer's key"),
    "chain without root": (SHORT, "a chain of 2 certificates, expected 3"),
    "chain in another order": (SWAPPED, "another certificate where Intel SGX PCK Certificate"),
    "signer of documents as PCK": (BY_SIGNER, "where Intel SGX PCK Certificate should stand"),
    "PCK as signer of documents": (
        Toy(signer_name="Intel SGX PCK Certificate"),
        f"where {SIGNER} should stand",
    ),
    "PCK that is an authority": (Toy(pck_is_ca=True), "authority stands where none should"),
    "CA that is none": (Toy(ca_is_ca=False), "authority stands where none should, or none does"),
    "PCK that may not sign": (Toy(pck_may_sign=False), "may not be used for signatures"),
    "critical extension": (Toy(extension_is_critical=True), "a critical extension that is not"),
    "SHA-384": (Toy(ca_algorithm=hashes.SHA384), "not signed with ECDSA and SHA-256"),
    "P-384": (Toy(ca_key=ec.generate_private_key(ec.SECP384R1())), "not on the curve P-256"),
    # Dates
    "expired CA": (Toy(ca_period=PAST), "certificate of the chain expired on 2026-02-19"),
    "expired PCK": (Toy(pck_period=PAST), "certificate of the chain expired"),
    "expired signer": (Toy(signer_period=PAST), "certificate of the chain expired"),
    "PCK of the future": (Toy(pck_period=FUTURE), "not valid before 2026-03-11"),
    "expired CRL": (Toy(crl_period=PAST), "a revocation list expired"),
    "CRL of the future": (Toy(crl_period=FUTURE), "a revocation list is not valid before"),
    "expired documents": (Toy(document_period=PAST), "TCB info expired"),
    "documents of the future": (Toy(document_period=FUTURE), "TCB info is not valid before"),
    # Revocation
    "revoked PCK": (Toy(revoked_by_ca=(5, PCK_SERIAL)), "certificate of the chain is revoked"),
    "revoked CA": (Toy(revoked_by_root=(CA_SERIAL,)), "certificate of the chain is revoked"),
    "revoked signer": (Toy(revoked_by_root=(SIGNER_SERIAL,)), "of the chain is revoked"),
    "forged root CRL": (Toy(root_crl_key=key("other")), "root_ca_crl must be signed by the root"),
    "forged PCK CRL": (Toy(pck_crl_key=key("other")), "pck_crl by the CA that issued"),
    # Documents
    "other platform type": (
        Toy(tcb_fmspc=bytes(6)),
        "for FMSPC 000000000000 and PCE ID 0000, the platform has 00a067110000 and 0000",
    ),
    "other PCE": (Toy(tcb_info_changes=(("pceId", "0001"),)), "00a067110000 and PCE ID 0001"),
    "TCB below every level": (
        Toy(components=(1, *COMPONENTS[1:])),
        "below every level that Intel lists",
    ),
    "PCE below every level": (Toy(pce_svn=4), "below every level that Intel lists"),
    "TCB info of TDX": (Toy(tcb_info_changes=(("id", "TDX"),)), "not for SGX in version 3"),
    "TCB info, version 2": (Toy(tcb_info_changes=(("version", 2),)), "not for SGX in version 3"),
    "QE identity of TDX": (Toy(qe_identity_changes=(("id", "TD_QE"),)), "not SGX's in version 2"),
    "unknown status": (
        Toy(levels=(tcb_level(COMPONENTS, PCE_SVN, "Splendid"),)),
        "TCB info lacks a field or has it with another type",
    ),
    "15 components": (
        Toy(levels=(tcb_level(COMPONENTS[1:], PCE_SVN, "UpToDate"),)),
        "does not have 16 components",
    ),
    "SVN that is no number": (
        Toy(levels=(tcb_level((True, *COMPONENTS[1:]), PCE_SVN, "UpToDate"),)),
        "TCB info lacks a field or has it with another type",
    ),
    "levels that are no list": (
        Toy(tcb_info_changes=(("tcbLevels", "none"),)),
        "TCB info lacks a field or has it with another type",
    ),
    "short mask": (
        Toy(qe_identity_changes=(("miscselectMask", "FF"),)),
        "QE identity lacks a field or has it with another type",
    ),
    # Quoting enclave
    "QE of another signer": (Toy(qe_mrsigner=b"\1" * 32), "not made by Intel's quoting enclave"),
    "another enclave of the signer": (Toy(qe_product_id=2), "not made by Intel's quoting enclave"),
    "QE in DEBUG mode": (Toy(qe_attributes=DEBUG_QE), "not made by Intel's quoting enclave"),
    "QE below every level": (Toy(qe_svn=4), "older than every version that Intel lists"),
    "QE for another key": (Toy(bound_key=key("other")), "is for another attestation key"),
    # Intel's extension
    "no extension fields": (Toy(extension=der(0x30, b"")), "lacks a field"),
    "extension that is no sequence": (Toy(extension=b"\x04\0"), "not a sequence"),
}
# `dcap-qvl` 0.7.0 takes these; nothing here depends on its doing so.
LAXER = {
    "PCK that may not sign",
    "chain without root",
    "PCK as signer of documents",
    "CRL of the future",
    "other PCE",
    "TCB info, version 2",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_platform_is_refused(case):
    toy, text = REFUSALS[case]
    with pytest.raises(AttestationError, match=text):
        verify(toy)


@pytest.mark.parametrize("case", sorted(REFUSALS.keys() - LAXER))
def test_dcap_qvl_refuses_as_well(case):
    with pytest.raises(ValueError):
        verify_with_dcap_qvl(REFUSALS[case][0])


def test_expired_root_is_refused():
    toy = Toy(root_period=PAST)
    with pytest.raises(AttestationError, match="certificate of the chain expired on 2026-02-19"):
        verify(toy, root=toy)


def test_chain_longer_than_its_root_allows_is_refused():
    toy = Toy(root_path_length=0)
    with pytest.raises(AttestationError, match="a chain is longer than"):
        verify(toy, root=toy)


@pytest.mark.parametrize(
    ("days", "text"),
    [(-1.01, "revocation list is not valid|TCB info is not valid"), (1.01, "expired on")],
)
def test_dates_are_the_callers(days, text):
    assert verify(TOY, NOW + 0.99 * DAY).name == verify(TOY, NOW - 0.99 * DAY).name == "UpToDate"
    with pytest.raises(AttestationError, match=text):
        verify(TOY, NOW + days * DAY)


DOCUMENTS = ("tcb_info", "tcb_info_signature", "qe_identity", "qe_identity_signature")


@pytest.mark.parametrize("field", DOCUMENTS)
def test_altered_document_is_refused(field):
    fields = json.loads(TOY.collateral_json)
    digit = fields[field].rindex("0")
    fields[field] = fields[field][:digit] + "1" + fields[field][digit + 1 :]
    collateral = Collateral.from_json(json.dumps(fields))
    with pytest.raises(AttestationError, match="is not signed by Intel"):
        verify_quote(parse_quote(TOY.quote), collateral, NOW, root_sha256=TOY.root_sha256)


@pytest.mark.parametrize("field", ["root_ca_crl", "pck_crl"])
@pytest.mark.parametrize("position", [0.1, 0.3, 0.5, 0.95])
def test_altered_revocation_list_is_refused(field, position):
    fields = json.loads(TOY.collateral_json)
    encoded = bytes.fromhex(fields[field])
    offset = int(position * len(encoded))
    fields[field] = patched(encoded, offset, bytes([encoded[offset] ^ 1])).hex()
    collateral = Collateral.from_json(json.dumps(fields))
    with pytest.raises(AttestationError, match="a revocation list (is|expired)"):
        verify_quote(parse_quote(TOY.quote), collateral, NOW, root_sha256=TOY.root_sha256)


def test_revocation_lists_of_each_other_are_refused():
    fields = json.loads(TOY.collateral_json)
    fields["pck_crl"], fields["root_ca_crl"] = fields["root_ca_crl"], fields["pck_crl"]
    collateral = Collateral.from_json(json.dumps(fields))
    with pytest.raises(AttestationError, match="a revocation list is not its issuer's"):
        verify_quote(parse_quote(TOY.quote), collateral, NOW, root_sha256=TOY.root_sha256)


# TCB status

PLATFORM_STATUSES = [s for s in tcb.STATUSES if s != "Revoked"]


@pytest.mark.parametrize("quoting", ["UpToDate", "OutOfDate"])
@pytest.mark.parametrize("platform", PLATFORM_STATUSES)
def test_statuses_converge_as_in_dcap_qvl(platform, quoting):
    toy = Toy(
        levels=(tcb_level(COMPONENTS, PCE_SVN, platform, "INTEL-SA-00001", "INTEL-SA-00002"),),
        qe_levels=(level({"isvsvn": 8}, quoting, ("INTEL-SA-00002", "INTEL-SA-00003")),),
    )
    ours, theirs = verify(toy), verify_with_dcap_qvl(toy)
    assert ours.name == theirs.name
    assert sorted(ours.advisories) == sorted(theirs.advisories)


@pytest.mark.parametrize("status", sorted(set(tcb.STATUSES) - set(tcb.QE_STATUSES)))
@pytest.mark.parametrize("better", [(), ((8, "UpToDate"),)], ids=["reached", "not reached"])
def test_quoting_enclave_with_a_platforms_status_is_refused(status, better):
    levels = [level({"isvsvn": svn}, name) for svn, name in (*better, (1, status))]
    toy = Toy(qe_levels=tuple(levels))
    match = f"QE identity has a level with the status {status}, expected one of UpToDate, OutOf"
    with pytest.raises(AttestationError, match=match):
        verify(toy)


@pytest.mark.parametrize(
    "toy",
    [
        Toy(levels=(tcb_level(COMPONENTS, PCE_SVN, "Revoked"),)),
        Toy(qe_levels=(level({"isvsvn": 8}, "Revoked"),)),
    ],
    ids=["platform", "quoting enclave"],
)
def test_revoked_status_wins(toy):
    assert verify(toy).name == "Revoked"
    with pytest.raises(ValueError):
        verify_with_dcap_qvl(toy)


@pytest.mark.parametrize(
    ("components", "pce_svn", "name"),
    [
        (COMPONENTS, PCE_SVN, "UpToDate"),
        ((*COMPONENTS[:15], 1), PCE_SVN + 1, "UpToDate"),
        (COMPONENTS, PCE_SVN - 1, "OutOfDate"),
        (COMPONENTS, 11, "OutOfDate"),
    ],
)
def test_first_level_that_is_reached_counts(components, pce_svn, name):
    toy = Toy(components=components, pce_svn=pce_svn)
    assert verify(toy).name == verify_with_dcap_qvl(toy).name == name


@given(st.lists(st.integers(0, 3), min_size=16, max_size=16), st.integers(0, 3))
def test_level_is_reached_when_nothing_is_below_it(components, pce_svn):
    status = Status("UpToDate", ())
    bar = tcb.TCBLevel((1,) * 16, 1, status)
    floor = tcb.TCBLevel((0,) * 16, 0, Status("OutOfDate", ()))
    info = tcb.TCBInfo(bytes(6), bytes(2), (bar, floor))
    found = info.status(SGXPlatform(bytes(6), bytes(2), tuple(components), pce_svn))
    assert (found == status) == (min(components) >= 1 and pce_svn >= 1)
