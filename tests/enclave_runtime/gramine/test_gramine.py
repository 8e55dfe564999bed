"""The staged tree is small, complete, and runs; with Gramine where there is one."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.gramine import building, closure, staging
from enclave_runtime.gramine.staging import StagingError
from enclave_runtime.sessions import session
from tempo_jax.cli.serve import served
from tempo_jax.errors import EnclaveDiedError
from tempo_jax.transport.child import Connection
from tempo_jax.transport.launch import Command
from tests.support.boundary import mappings
from tests.support.gramine import ROOT
from tests.support.steps import uniform

START_SECONDS = 10.0  # until an enclave takes requests, under `gramine-direct` too

# Staging


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(staging, "PACKAGES", ("enclave_runtime", "no_such_package", "neither"))
    with pytest.raises(StagingError, match="cannot find no_such_package, neither: install"):
        staging.find_source()


def test_only_named_packages_are_found():
    finder = closure.Only(["numpy"])
    assert finder.find_spec("json") and finder.find_spec("numpy")
    assert finder.find_spec("hypothesis") is None
    assert finder.find_spec("flax.linen") is None


def test_source_is_the_interpreter_itself():
    source = staging.find_source()
    assert source.interpreter.is_file() and not source.interpreter.is_symlink()
    assert (source.stdlib / "os.py").exists()
    assert ROOT.resolve() in source.roots


def test_libraries_that_are_missing_are_named(monkeypatch):
    def ldd(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        out = "\tlibz.so.1 => /lib/libz.so.1 (0x1)\n\tlibgone.so.2 => not found\n"
        return subprocess.CompletedProcess([], 0, out + "\tlibbeside.so => not found\n", "")

    monkeypatch.setattr(subprocess, "run", ldd)
    with pytest.raises(StagingError, match="shared libraries are missing: libgone.so.2$"):
        staging._needed([Path("/x/libbeside.so")])


@pytest.mark.slow
def test_the_staged_tree_is_small_and_complete(built):
    assert building.check(built) == []
    parsed = building.read_manifest(built)
    assert 1000 < len(parsed["sgx"]["trusted_files"]) < 2000
    names = [str(path.relative_to(built / "tree")) for path in staging.files_of(built / "tree")]
    assert not [n for n in names if n.endswith(".py")]
    folders = {part for name in names for part in Path(name).parts[:-1]}
    unwanted = {"site-packages", "tests", "test", "tkinter", "idlelib", "gramine"}
    assert folders & (unwanted | {"etils", "yaml", "pip", "flax", "optax", "tempo_jax"}) == set()
    # Gramine brings glibc; another one beside it would not fit its loader.
    assert not [n for n in names if re.match(r"lib/(libc|libm|ld-linux.*|libpthread)\.so", n)]
    # Code that only builds stays out; code that serves is there.
    own = {Path(n).stem for n in names if n.startswith("packages/enclave_runtime/")}
    modules = {
        path.stem
        for path in (ROOT / "enclave_runtime").rglob("*.py")
        if not {"gramine", "definitions"} & set(path.parts)
    }
    assert own == modules | {"kernels"}
    # Kernels are compiled, and what would compile them stays out.
    assert "packages/enclave_runtime/compiled/kernels.so" in names
    assert folders & {"numba", "llvmlite"} == set()


def staged_command(built: Path) -> Command:
    """What starts the staged enclave as an ordinary process."""
    tree = built / "tree"
    arguments = tuple(staging.command(tree, "-m", "enclave_runtime"))
    return Command(arguments, staging.host_environment(tree), Path("/"))


def shielded_step(enclave: tempo.Enclave, **options: Any) -> None:
    """One shielded product and what follows it, against plain JAX."""
    x, w = uniform(1, 130, 64), uniform(2, 64, 66)
    shielded = tempo.shield(lambda x, w: jnp.tanh(x @ w), enclave=enclave, offload="all", **options)
    before = enclave.statistics()["blindings"]
    result = enclave.open(shielded(enclave.seal(x), enclave.seal(w)))
    np.testing.assert_allclose(result, jnp.tanh(x @ w), atol=1e-9)
    assert enclave.statistics()["blindings"] > before


@pytest.mark.slow
def test_the_staged_tree_runs_and_loads_nothing_else(built):
    """As near to Gramine as a machine without it gets: the tree alone, under its options."""
    start = time.monotonic()
    with tempo.Enclave(Connection(staged_command(built))) as enclave:
        assert time.monotonic() - start < START_SECONDS
        shielded_step(enclave, verify=True)
        shielded_step(enclave, scheme=tempo.schemes.SignedPermutation())
        enclave.use_checkpoint_key(tempo.CheckpointKey.generate())
        state = {"step": jnp.arange(3.0)}
        restored = enclave.restore(enclave.checkpoint(enclave.seal(state)), like=state)
        np.testing.assert_array_equal(enclave.open(restored)["step"], [0, 1, 2])
        maps = mappings(enclave.connection.process.pid)
    objects = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if ".so" in line}
    assert len(objects) > 80
    foreign = {Path(o).name for o in objects if not o.startswith(f"{built}/tree/")}
    assert {n for n in foreign if not staging._GLIBC.fullmatch(n)} == set()


@pytest.mark.slow
def test_the_staged_tree_serves_over_tls(built, tmp_path):
    policy = tempo.AttestationPolicy(insecure_accept_no_sgx=True)
    with (
        served(host_key=tmp_path / "key", command=staged_command(built)) as ports,
        tempo.Enclave.connect(ports.client, policy=policy) as client,
    ):
        np.testing.assert_array_equal(client.open(client.seal(jnp.arange(3.0))), [0, 1, 2])


@pytest.mark.slow
def test_modules_come_from_the_staged_tree(built):
    tree = built / "tree"
    code = (
        "import sys, json, enclave_runtime.serving.server\n"
        "from enclave_runtime.schemes.kernels import hadamard\n"
        "hadamard.warm_up()\n"
        "files = [getattr(m, '__file__', None) for m in sys.modules.values()]\n"
        "print(json.dumps([sys.path, sys.flags.no_site, [f for f in files if f]]))"
    )
    run = subprocess.run(
        staging.command(tree, "-c", code),
        env=staging.host_environment(tree),
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    path, no_site, files = json.loads(run.stdout)
    assert no_site == 1
    assert all(Path(p).is_relative_to(tree) for p in path)
    assert len(files) > 500
    assert [f for f in files if not Path(f).is_relative_to(tree)] == []


# With Gramine


def test_peak_memory_where_gramine_tells_only_what_was_mapped(tmp_path):
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  400000 kB\n")
    assert session._peak_memory(str(status)) == 400000 * 1024
    status.write_text("VmPeak:\t  400000 kB\nVmHWM:\t     300 kB\n")
    assert session._peak_memory(str(status)) == 300 * 1024


@pytest.mark.gramine
@pytest.mark.slow
def test_shielded_call_under_gramine(built):
    start = time.monotonic()
    with tempo.Enclave.launch(kind="gramine-direct", directory=built) as enclave:
        assert time.monotonic() - start < START_SECONDS
        shielded_step(enclave)
        assert enclave.statistics()["peak_memory_bytes"] > 0


@pytest.mark.gramine
@pytest.mark.slow
def test_a_changed_byte_is_refused_under_gramine(built):
    path = built / "tree/packages/enclave_runtime/server.pyc"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(EnclaveDiedError):
            tempo.Enclave.launch(kind="gramine-direct", directory=built)
    finally:
        path.write_bytes(content)
    # It was the byte: with the old one back the enclave starts.
    tempo.Enclave.launch(kind="gramine-direct", directory=built).close()
