"""The command `tempo-jax`, as a host's administrator and a curious client use it."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tempo_jax as tempo
from tempo_jax.cli import inspect
from tempo_jax.cli.main import main
from tempo_jax.cli.serve import ServingProcess, served
from tempo_jax.transport import launch
from tests.support.processes import is_running, wait_until
from tests.transport.test_launch import stand_in, write_manifest

INSECURE = tempo.AttestationPolicy(insecure_accept_no_sgx=True)


@pytest.fixture(scope="module")
def ports(tmp_path_factory) -> Iterator[ServingProcess]:
    """A serving enclave without owner."""
    with served(host_key=tmp_path_factory.mktemp("command") / "key") as running:
        yield running


def test_inspection_says_that_nothing_is_proved(ports, capsys):
    assert main(["enclave", "inspect", ports.client]) == 0
    printed = capsys.readouterr().out
    assert f"session      {ports.session}, without owner" in printed
    assert "platform     process" in printed
    assert "It shows no SGX quote and proves nothing" in printed


def test_inspection_is_not_called_a_refused_connection(capfd):
    assert main(["enclave", "inspect", "--local"]) == 0
    assert "It shows no SGX quote and proves nothing" in (shown := capfd.readouterr()).out
    assert "refused" not in shown.err


def test_inspection_owns_nothing_and_reads_by_machine(ports, capsys):
    for _ in range(2):
        assert main(["enclave", "inspect", ports.client, "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second and first["owned"] is False and first["bound"] is True
    assert first["measurement"] == {} and len(first["key_sha256"]) == 64
    identity = tempo.ClientIdentity.generate()
    with tempo.Enclave.connect(ports.client, policy=INSECURE, identity=identity):
        assert inspect.inspect(ports.client).owned


def test_inspection_of_this_machine(capsys):
    assert main(["enclave", "inspect", "--local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["platform"] == "process"


def sigstruct(mrenclave: bytes, modulus: bytes, product_id: int, svn: int) -> bytes:
    """What Gramine's tool leaves as a signature, as far as it is read (Intel SDM, volume 3D)."""
    content = bytearray(1808)
    content[:16] = bytes.fromhex("06000000e10000000000010000000000")
    content[128:512] = modulus
    content[960:992] = mrenclave
    content[1024:1028] = product_id.to_bytes(2, "little") + svn.to_bytes(2, "little")
    return bytes(content)


@pytest.fixture
def signed(monkeypatch, tmp_path) -> Path:
    """A built and signed folder, and stand-ins for Gramine's loaders."""
    folder = tmp_path / "built"
    write_manifest(folder)
    shutil.copy(folder / "enclave.manifest", folder / "enclave.manifest.sgx")
    (folder / "enclave.sig").write_bytes(sigstruct(b"\1" * 32, b"\2" * 384, 3, 5))
    for name in ("gramine-direct", "gramine-sgx"):
        stand_in(tmp_path, name)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", launch._root(), prepend=os.pathsep)
    return folder


def test_inspection_of_a_build_shows_what_was_signed(signed, capsys):
    options = ["enclave", "inspect", "--local", "--kind", "gramine-sgx", "--directory", str(signed)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    mrsigner = hashlib.sha256(b"\2" * 384).hexdigest()
    for line in (
        rf"signed mrenclave +{'01' * 32}",
        rf"signed mrsigner +{mrsigner}",
        r"signed product_id +3",
        r"signed svn +5",
    ):
        assert re.search(f"^{line}$", printed, re.MULTILINE), printed
    # It is the loader's enclave that answered; this one stands in for Gramine and has no quote.
    assert "It shows no SGX quote and proves nothing" in printed
    assert main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signed_build"]["mrenclave"] == "01" * 32
    (signed / "enclave.sig").write_bytes(bytes(1808))
    assert main(options) == 1
    assert "enclave.sig is not the signature of an enclave" in capsys.readouterr().err


def test_inspection_reads_the_measurement_out_of_a_quote():
    quote = (Path(__file__).parent.parent / "data" / "sgx_quote").read_bytes()
    evidence = inspect.Evidence("gramine-sgx", quote=quote)
    measurement, data = inspect._measurement(evidence)
    assert measurement["mrenclave"] == quote[112:144].hex()
    assert measurement["mrsigner"] == quote[176:208].hex()
    assert data == quote[368:432]
    shown = {**measurement, "debug": False}
    found = inspect.Inspection("a:1", "gramine-sgx", "s", False, "00", True, shown)
    assert "signatures and TCB status are verified only then" in found.verdict
    assert str(measurement["mrenclave"]) in str(found)
    debug = inspect.Inspection("a:1", "gramine-sgx", "s", False, "00", True, {"debug": True})
    assert "DEBUG mode" in debug.verdict
    unbound = inspect.Inspection("a:1", "process", "s", False, "00", False, {})
    assert "do not connect" in unbound.verdict


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["enclave", "inspect", "127.0.0.1:1"], 1, "nothing answers at 127.0.0.1:1"),
        (["enclave", "inspect", "nowhere"], 1, "expected HOST:PORT"),
        (["enclave", "inspect", "a:1", "--kind", "gramine-sgx"], 1, "give them with --local"),
        (["enclave", "inspect", "a:1", "--directory", "."], 1, "give them with --local"),
        (["enclave", "inspect", "--local", "--directory", "."], 1, "runs from no directory"),
        (["enclave", "inspect"], 2, "one of the arguments ADDRESS --local is required"),
        (["enclave", "serve", "--client-port", "65536"], 2, "'65536' is not the number of a port"),
        (["enclave", "serve", "--host-port", "x"], 2, "'x' is not the number of a port"),
        (["enclave"], 2, "required: ACTION"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_what_is_wrong_is_said(arguments, status, text, capsys):
    try:
        assert main(arguments) == status
    except SystemExit as ended:
        assert ended.code == status
    assert text in capsys.readouterr().err


def test_enclave_that_cannot_listen_says_why(ports, capfd, tmp_path):
    taken = ports.client.rpartition(":")[2]
    key = str(tmp_path / "key")
    assert main(["enclave", "serve", "--client-port", taken, "--host-key", key]) == 1
    printed = capfd.readouterr().err
    assert "enclave: cannot start:" in printed and "ended with status 2" in printed
    assert not Path(key).exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_serving_ends_with_the_command(tmp_path, how):
    key = tmp_path / "key"
    command = [sys.executable, "-m", "tempo_jax", "enclave", "serve", "--json"]
    ports = ["--client-port", "0", "--host-port", "0", "--host-key", str(key)]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            where = json.loads(process.stdout.readline())
            assert where["host_key"] == str(key) and key.stat().st_mode & 0o777 == 0o600
            assert main(["enclave", "inspect", where["client"]]) == 0
            tempo.Enclave.attach(where["host"], host_key=key).close()
            process.send_signal(how)
            status = process.wait(20)
        finally:
            process.kill()
    assert wait_until(lambda: not is_running(where["process"]))
    if how is not signal.SIGKILL:
        assert status == 0 and not key.exists()


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tempo-jax {tempo.__version__}\n"
