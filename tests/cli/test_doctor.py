"""What the doctor finds: each check on machines that lack what it looks for."""

import builtins
import json
import os
import sys

import jax
import pytest

from tempo_jax.cli import doctor, main
from tempo_jax.cli.doctor import Finding, diagnose, format_findings
from tempo_jax.planning import calibration


def test_this_machine_has_what_it_takes():
    findings = diagnose()
    names = [f.name for f in findings]
    assert len(set(names)) == len(names) == 11
    assert not [f for f in findings if f.status == "fail"]
    assert all(f.detail for f in findings)
    # Whatever is wrong comes with what to do.
    assert all(f.fix for f in findings if f.status != "ok" and f.name != "memory")


def test_findings_as_text():
    findings = [Finding("a", "ok", "there"), Finding("long", "fail", "gone", "get one")]
    assert format_findings(findings) == (
        "ok    a     there\nfail  long  gone\n            -> get one"
    )
    assert format_findings([]) == ""


def test_another_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    found = doctor._system()
    assert found.status == "fail" and "use Linux" in found.fix


def test_another_processor(monkeypatch):
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    found = doctor._system()
    assert found.status == "warn" and "SGX needs x86_64" in found.fix


@pytest.mark.parametrize(
    "version, status", [("0.10.1", "fail"), ("0.9.9", "fail"), ("0.10.2", "ok"), ("1.0", "ok")]
)
def test_jax_versions(monkeypatch, version, status):
    monkeypatch.setattr(jax, "__version__", version)
    found = doctor._jax()
    assert found.status == status and version in found.detail
    assert ("pip install" in found.fix) == (status == "fail")


def test_no_jax(monkeypatch):
    genuine = builtins.__import__

    def without_jax(name, *rest):
        if name == "jax":
            raise ImportError("No module named 'jax'")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_jax)
    assert doctor._jax() == Finding(
        "jax", "fail", "No module named 'jax'", "pip install -U tempo-jax"
    )
    assert doctor._devices().status == "fail"


def test_devices(monkeypatch):
    found = doctor._devices()
    assert found.status == "warn" and "8 cpu:cpu" in found.detail and "jax[cuda12]" in found.fix

    class Accelerator:
        platform, device_kind = "gpu", "some card"

    monkeypatch.setattr(jax, "devices", lambda: [Accelerator()] * 2)
    assert doctor._devices() == Finding("devices", "ok", "2 gpu:some card")

    def broken():
        raise RuntimeError("Unable to initialize backend\nand much more")

    monkeypatch.setattr(jax, "devices", broken)
    found = doctor._devices()
    assert (found.status, found.detail) == ("fail", "Unable to initialize backend")


@pytest.mark.parametrize(
    "name, status", [("glibc 2.17", "fail"), ("glibc 2.36", "ok"), (None, "fail")]
)
def test_c_library(monkeypatch, name, status):
    def confstr(_):
        if name is None:
            raise ValueError("unrecognized configuration name")
        return name

    monkeypatch.setattr(os, "confstr", confstr)
    assert doctor._glibc().status == status


def test_shared_memory(monkeypatch, tmp_path):
    found = doctor._shared_memory(str(tmp_path / "none"))
    assert found.status == "fail" and "does not exist" in found.detail
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = doctor._shared_memory(str(tmp_path))
    assert found.status == "fail" and found.fix.startswith("chmod 1777")
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(doctor, "SHARED_BYTES", 1 << 60)
    found = doctor._shared_memory(str(tmp_path))
    assert found.status == "warn" and "--shm-size" in found.fix
    monkeypatch.setattr(doctor, "SHARED_BYTES", 0)
    assert doctor._shared_memory(str(tmp_path)).status == "ok"


@pytest.mark.parametrize(
    "text, status, words",
    [
        ("MemAvailable:   16777216 kB\n", "ok", "16.0 GB"),
        ("MemAvailable:    6291456 kB\n", "warn", "enough without SGX"),
        ("MemAvailable:    1048576 kB\n", "warn", "1.0 GB"),
        ("MemTotal: 5 kB\n", "warn", "does not say"),
    ],
)
def test_memory(tmp_path, text, status, words):
    path = tmp_path / "meminfo"
    path.write_text(text)
    found = doctor._memory(str(path))
    assert found.status == status and words in found.detail
    assert doctor._memory(str(tmp_path / "none")).status == "warn"


TOOLS = ("gramine-direct", "gramine-sgx", "gramine-manifest", "gramine-sgx-sign")


@pytest.mark.parametrize(
    "found, detail, fix",
    [
        ([], "not on the PATH: gramine-direct, gramine-sgx, ", "install Gramine 1.9"),
        (["gramine-manifest"], "; found: gramine-manifest", "install Gramine 1.9"),
        (["gramine-direct"], "direct only, without SGX; ", "kind='gramine-direct' starts"),
        (
            ["gramine-direct", "gramine-manifest", "gramine-sgx-sign"],
            "direct only, without SGX; not on the PATH: gramine-sgx; found: gramine-direct, ",
            "for kind='gramine-sgx' install",
        ),
        (["gramine-sgx"], "not on the PATH: gramine-direct, ", "built and signed start"),
        (TOOLS[:3], "not on the PATH: gramine-sgx-sign", "built and signed start"),
        (TOOLS, "gramine-direct, gramine-sgx, gramine-manifest, gramine-sgx-sign on the", ""),
    ],
)
def test_gramine(tmp_path, found, detail, fix):
    for tool in found:
        (tmp_path / tool).touch(mode=0o755)
    finding = doctor._gramine(str(tmp_path))
    assert finding.status == ("ok" if found == TOOLS else "warn")
    assert detail in finding.detail and fix in finding.fix
    assert ("found" in finding.detail) == (0 < len(found) < len(TOOLS))


def test_sgx_devices(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu aes avx2\n")
    found = doctor._sgx_devices(str(tmp_path), str(cpuinfo))
    assert found.status == "warn" and "shows no SGX" in found.detail and "firmware" in found.fix
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sgx sgx_lc\n")
    found = doctor._sgx_devices(str(tmp_path), str(cpuinfo))
    assert "the processor has SGX" in found.detail and "kernel of 5.11" in found.fix
    for node in ("sgx_enclave", "sgx_provision"):
        (tmp_path / node).touch()
    assert doctor._sgx_devices(str(tmp_path), str(cpuinfo)).status == "ok"
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = doctor._sgx_devices(str(tmp_path), str(cpuinfo))
    assert found.status == "warn" and "groups" in found.fix


def test_quoting(tmp_path):
    socket = tmp_path / "aesm.socket"
    found = doctor._quoting(str(socket), lambda name: None)
    assert found.status == "warn" and "aesmd" in found.detail and "libsgx_dcap_ql" in found.detail
    socket.touch()
    assert doctor._quoting(str(socket), lambda name: f"lib{name}.so.1").status == "ok"


def test_signing_key(tmp_path):
    key = tmp_path / "key.pem"
    assert "gramine-sgx-gen-private-key" in doctor._signing_key(str(key)).fix
    key.touch(mode=0o644)
    assert doctor._signing_key(str(key)).fix == f"chmod 600 {key}"
    key.chmod(0o600)
    assert doctor._signing_key(str(key)).status == "ok"


def test_the_command_shows_and_judges(monkeypatch, capsys):
    findings = [Finding("a", "ok", "there"), Finding("b", "warn", "gone", "get it")]
    monkeypatch.setattr(main, "diagnose", lambda: findings)
    assert main.main(["doctor"]) == 0
    assert capsys.readouterr().out == format_findings(findings) + "\n"
    findings.append(Finding("c", "fail", "gone", "get it"))
    assert main.main(["doctor", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown[2] == {"name": "c", "status": "fail", "detail": "gone", "fix": "get it"}


def test_rates_and_their_age(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "not measured yet" in doctor._rates().detail
    calibration.machine_costs("process", lambda: {"dot_flops": 7e10})
    found = doctor._rates()
    assert found.status == "ok"
    assert "costs-" in found.detail and "70 GFLOP/s inside" in found.detail
    assert found.detail.endswith("measured today")
    (model,) = calibration.cached_costs().values()
    calibration.doubt("process", model)
    assert doctor._rates().detail.endswith("by the next launch, since runs disagreed")
    monkeypatch.setenv(calibration.SHIPPED, str(tmp_path / "none.json"))
    found = doctor._rates()
    assert found.status == "warn" and "none.json" in found.detail
