"""Which command starts which kind of enclave, and what a machine that cannot start it is told."""

import os
import shutil
import stat
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tempo_jax as tempo
from enclave_runtime.environment import ENCLAVE_ENVIRONMENT
from enclave_runtime.gramine import manifest
from tempo_jax.errors import EnclaveError, LaunchError
from tempo_jax.transport import launch
from tempo_jax.transport.child import Connection


@pytest.fixture(autouse=True)
def usual_environment(monkeypatch) -> None:
    """Enclaves start as they do outside of tests, without the flags of `support.quick`."""
    monkeypatch.setattr(launch, "ENCLAVE_ENVIRONMENT", ENCLAVE_ENVIRONMENT)


@pytest.fixture
def tools(monkeypatch, tmp_path) -> Path:
    """A folder that is searched first for tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


def stand_in(folder: Path, name: str) -> None:
    """A loader that, like Gramine's, takes an application's name and reads its manifest there."""
    path = folder / name
    path.write_text(
        f'#!/bin/sh\n[ "$#" = 1 ] && [ -f "$1.manifest" ] || exit 3\n'
        f'exec "{sys.executable}" -m enclave_runtime\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def built(tmp_path) -> Path:
    """A folder that looks built."""
    folder = tmp_path / "built"
    write_manifest(folder)
    return folder


def write_manifest(folder: Path) -> None:
    """A manifest that keeps the rules, for a tree of one file."""
    (folder / "tree").mkdir(parents=True, exist_ok=True)
    (folder / "tree" / "file").touch()
    (folder / "enclave.manifest").write_text(manifest.render(manifest.own_part(folder)))


def test_ordinary_process(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_for_the_devices")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/kernels")
    command = launch.command()
    assert command == launch.command("process")
    assert command.arguments == (sys.executable, "-m", "enclave_runtime")
    assert command.directory is None
    assert "XLA_FLAGS" not in command.environment
    assert command.environment["NUMBA_CACHE_DIR"] == "/kernels"
    assert command.environment.items() >= ENCLAVE_ENVIRONMENT.items()


# What would write a program, compiled code or an interpreter's findings to a file, or show it.
def hostile(folder: Path) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DUMP_IR_TO": str(folder / "ir"),
        "JAX_LOG_COMPILES": "true",
        "JAX_LOGGING_LEVEL": "DEBUG",
        "XLA_FLAGS": f"--xla_dump_to={folder / 'xla'} --xla_dump_hlo_as_text",
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_MAX_VLOG_LEVEL": "3",
        "NUMBA_DUMP_ASSEMBLY": "1",
        "PYTHONINSPECT": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONVERBOSE": "1",
        "PYTHONPERFSUPPORT": "1",
    }


def test_hostile_environment_gets_no_program_out(monkeypatch, tmp_path, capfd):
    jnp.zeros(()).block_until_ready()  # this process's JAX and XLA have read their settings
    variables = hostile(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not variables.keys() - {"JAX_ENABLE_COMPILATION_CACHE"} & launch._environment().keys()
    with tempo.Enclave.launch() as enclave:
        x = jnp.arange(36.0).reshape(6, 6)
        shielded = tempo.shield(lambda x: jnp.tanh(x @ x) @ x, enclave=enclave, offload="all")
        np.testing.assert_allclose(enclave.open(shielded(x)), jnp.tanh(x @ x) @ x)
        process = enclave.connection.process
    assert process.returncode == 0  # and not an interpreter that asks what to do next
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert capfd.readouterr().err == ""


def test_unknown_kind():
    with pytest.raises(LaunchError, match="kind 'sgx', expected one of process, gramine-direct"):
        tempo.Enclave.launch(kind="sgx")  # pyright: ignore[reportArgumentType]
    assert issubclass(LaunchError, EnclaveError)


def test_ordinary_process_takes_no_directory(built):
    with pytest.raises(LaunchError, match="'process' runs from no directory"):
        tempo.Enclave.launch(directory=built)


@pytest.mark.parametrize("kind", ["gramine-direct", "gramine-sgx"])
def test_without_gramine(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=f"{kind} is not on the PATH: install Gramine 1.9"):
        tempo.Enclave.launch(kind=kind)


def test_directory_that_is_not_built(tools, tmp_path):
    stand_in(tools, "gramine-direct")
    fix = r"enclave_runtime\.gramine build --out .*/empty"
    with pytest.raises(LaunchError, match=f"holds no enclave for Gramine: build one with `.*{fix}"):
        tempo.Enclave.launch(kind="gramine-direct", directory=tmp_path / "empty")


def test_directory_that_is_not_signed(tools, built):
    stand_in(tools, "gramine-sgx")
    with pytest.raises(LaunchError, match="is not signed: make a key with `gramine-sgx-gen-priv"):
        tempo.Enclave.launch(kind="gramine-sgx", directory=built)
    shutil.copy(built / "enclave.manifest", built / "enclave.manifest.sgx")
    (built / "enclave.sig").touch()
    command = launch.command("gramine-sgx", built)
    assert command.arguments == (str(tools / "gramine-sgx"), "enclave")


@pytest.mark.parametrize("name", ["enclave.manifest", "enclave.manifest.sgx"])
def test_directory_that_breaks_rules_is_not_started(tools, built, name):
    for tool in ("gramine-direct", "gramine-sgx"):
        stand_in(tools, tool)
    shutil.copy(built / "enclave.manifest", built / "enclave.manifest.sgx")
    (built / "enclave.sig").touch()
    altered = built / name
    altered.write_text(altered.read_text().replace("sgx.debug = false", "sgx.debug = true"))
    for kind in ("gramine-direct", "gramine-sgx"):
        text = rf"breaks rules; build it again:\n{name}: sgx\.debug is True, expected False"
        with pytest.raises(LaunchError, match=text):
            tempo.Enclave.launch(kind=kind, directory=built)


def test_loader_runs_in_the_directory_and_gets_the_secret_through_its_pipe(
    tools, built, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", launch._root())
    stand_in(tools, "gramine-direct")
    with tempo.Enclave.launch(kind="gramine-direct", directory=built) as enclave:
        sealed = enclave.seal(jnp.arange(3.0))
        np.testing.assert_array_equal(enclave.open(sealed), [0, 1, 2])
        result = tempo.shield(lambda x: x + 1, enclave=enclave)(sealed)
        np.testing.assert_array_equal(enclave.open(result), [1, 2, 3])


def test_peak_memory_is_resident_memory_under_gramine(tools, built, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", launch._root())
    stand_in(tools, "gramine-direct")
    with tempo.Enclave.launch(kind="gramine-direct", directory=built) as enclave:
        connection = enclave.connection
        assert isinstance(connection, Connection)
        # Gramine would answer with what was mapped.
        answer = {**enclave.statistics(), "peak_memory_bytes": 1 << 60}
        monkeypatch.setattr(connection, "request", lambda *_: answer)
        peak = enclave.statistics()["peak_memory_bytes"]
        assert 50 << 20 < peak < 4 << 30 and peak % 4096 == 0
        for kind in ("process", "gramine-sgx"):
            monkeypatch.setattr(connection, "kind", kind)
            assert enclave.statistics() == answer
        monkeypatch.undo()


def test_cache_is_built_once_and_again_when_it_is_old(tools, monkeypatch, tmp_path):
    stand_in(tools, "gramine-direct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builds = []

    def build(directory: Path) -> None:
        builds.append(directory)
        write_manifest(directory)

    monkeypatch.setattr(launch, "_build", build)
    monkeypatch.setattr(launch, "_is_current", lambda _: True)
    first = launch.command("gramine-direct")
    assert first == launch.command("gramine-direct")
    assert builds == [tmp_path / "cache/tempo_jax/gramine"] == [first.directory]
    monkeypatch.setattr(launch, "_is_current", lambda _: False)
    launch.command("gramine-direct")
    assert len(builds) == 2


def test_an_unfinished_build_is_not_current(tmp_path):
    assert not launch._is_current(tmp_path)


def test_a_build_that_fails_leaves_nothing(monkeypatch, tmp_path):
    kept = tmp_path / "cache" / "gramine"
    kept.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LaunchError, match="the enclave for Gramine could not be built"):
        launch._build(kept)
    assert [path.name for path in kept.parent.iterdir()] == ["gramine"]
