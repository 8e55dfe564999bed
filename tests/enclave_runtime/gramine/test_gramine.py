"""The Gramine folder: the manifest's rules, staging, and the staged tree as it would run inside."""

import copy
import json
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import enclave_runtime
import tempo_jax as tempo
from enclave_runtime.gramine import __main__ as cli
from enclave_runtime.gramine import building, closure, manifest, manifest_rules, staging
from enclave_runtime.gramine.building import BuildError, Options, build
from enclave_runtime.gramine.staging import Staged, StagingError
from enclave_runtime.protocol import limits
from enclave_runtime.sessions import session
from tempo_jax.cli.serve import served
from tempo_jax.errors import EnclaveDiedError
from tempo_jax.transport.child import Connection
from tempo_jax.transport.launch import Command
from tests.support.boundary import mappings
from tests.support.steps import uniform

START_SECONDS = 10.0  # until an enclave takes requests, under `gramine-direct` too
ROOT = Path(enclave_runtime.__file__).parent.parent


def make_tree(tree: Path, *_: Any, **__: Any) -> Staged:
    """A tree of three small files, where staging the real one takes half a minute."""
    for name in ("bin/python3", "lib/libz.so.1", "packages/enclave_runtime/__init__.pyc"):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return Staged(modules=1, objects=2, size=100, stripped=False, ahead=False)


@pytest.fixture
def directory(tmp_path) -> Path:
    """A built folder with a small tree."""
    make_tree(tmp_path / "tree")
    rendered = manifest.render(manifest.own_part(tmp_path))
    (tmp_path / "enclave.manifest").write_text(rendered)
    return tmp_path


@pytest.fixture
def parsed(directory) -> dict[str, Any]:
    """Its manifest."""
    return building.read_manifest(directory)


# The template, read here without the rules' own code


def test_manifest_is_for_production(parsed):
    text = json.dumps(parsed)
    assert not re.search("insecure__|debug__|experimental__|allow_all_but_log|passthrough", text)
    sgx = parsed["sgx"]
    assert sgx["debug"] is False
    assert sgx["remote_attestation"] == "dcap"
    assert sgx["file_check_policy"] == "strict"
    assert "allowed_files" not in sgx
    assert sgx["enclave_size"] == "8G"
    assert parsed["sys"]["disallow_subprocesses"] is True
    assert parsed["loader"]["log_level"] == "error"


def test_everything_mounted_is_trusted(parsed, directory):
    mounts = parsed["fs"]["mounts"]
    assert parsed["fs"]["root"] == {"type": "tmpfs"}  # and not the folder where Gramine starts
    assert [m["path"] for m in mounts] == ["/tmp", "/lib", "/lib64", "/enclave", "/dev/shm"]
    assert [m.get("type", "chroot") for m in mounts] == [
        *("tmpfs", "chroot", "chroot", "chroot", "untrusted_shm")
    ]
    trusted = parsed["sgx"]["trusted_files"]
    listed = {e["uri"]: e["sha256"] for e in trusted if isinstance(e, dict)}
    files = [p for p in (directory / "tree").rglob("*") if p.is_file()]
    assert listed == {
        f"file:{path.relative_to(directory)}": manifest.sha256(path) for path in files
    }
    # What is left belongs to Gramine, and is hashed by its tools.
    assert [e for e in trusted if isinstance(e, str)] == [mounts[1]["uri"] + "/"]


def test_argv_and_environment_are_fixed(parsed):
    loader = parsed["loader"]
    assert loader["argv"] == [
        *("python3", "-S", "-s", "-P", "-B", "-X", "utf8", "-m", "enclave_runtime")
    ]
    assert "argv_src_file" not in loader and "env_src_file" not in loader
    assert set(loader["env"]) == {
        *("HOME", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PLATFORMS", "LD_LIBRARY_PATH"),
        *("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"),
        *("MALLOC_TRIM_THRESHOLD_", "OPENBLAS_NUM_THREADS", "PYTHONHOME", "PYTHONPATH"),
    }
    assert all(isinstance(value, str) for value in loader["env"].values())
    assert loader["env"]["PYTHONPATH"] == "/enclave/packages"
    assert parsed["libos"]["entrypoint"] == "/enclave/bin/python3"


def test_every_setting_of_sgx_and_sys_has_its_reason():
    lines = (Path(manifest.__file__).parent / "enclave.manifest.template").read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"(sgx|sys|fs|loader)\.", line)]
    assert len(settings) > 12
    unexplained = [lines[i] for i in settings if not lines[i - 1].startswith("#")]
    assert unexplained == ['loader.entrypoint.uri = "file:{{ gramine.libos }}"', SVN]


SVN = "sgx.isvsvn = {{ svn }}"  # shares its comment with the product's number


def test_gramine_fills_in_only_where_it_lies(directory):
    template = manifest.own_part(directory)
    assert set(re.findall(r"\{\{ (.*?) \}\}", template)) == {
        "gramine.libos",
        "gramine.runtimedir()",
    }
    rendered = manifest.render(template, "/opt/gramine")
    assert "{{" not in rendered
    parsed = tomllib.loads(rendered)
    assert parsed["loader"]["entrypoint"] == {"uri": "file:/opt/gramine/libsysdb.so"}
    assert parsed["fs"]["mounts"][1]["uri"] == "file:/opt/gramine/runtime/glibc"
    assert manifest_rules.breaches(parsed) == []


def test_options_reach_the_manifest(directory):
    template = manifest.own_part(directory, enclave_size="16G", cpus=8, product_id=3, svn=5)
    sgx = tomllib.loads(manifest.render(template))["sgx"]
    assert (sgx["enclave_size"], sgx["isvprodid"], sgx["isvsvn"]) == ("16G", 3, 5)
    assert sgx["max_threads"] == 16 + 2 + 4 * 8 + 4 + limits.CONNECTIONS


# The rules


def test_a_sound_manifest_breaks_no_rule(parsed, directory):
    assert manifest_rules.breaches(parsed, cpus=1) == []
    assert manifest_rules.stale_files(parsed, directory) == []


def test_what_gramines_tools_add_is_taken(parsed):
    parsed["sgx"]["enable_stats"] = parsed["sgx"]["use_exinfo"] = False
    parsed["sgx"]["cpu_features"] = {
        **dict.fromkeys(("amx", "avx", "avx512"), "unspecified"),
        **dict.fromkeys(("mpx", "pkru"), "disabled"),
    }
    parsed["loader"]["entrypoint"]["sha256"] = "00" * 32
    assert manifest_rules.breaches(parsed) == []
    parsed["sgx"]["enable_stats"] = True
    assert manifest_rules.breaches(parsed) == [
        "sgx.enable_stats is not a setting of this manifest; leave it out"
    ]


def put(dotted: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets one setting."""

    def change(table: dict[str, Any]) -> None:
        *path, last = dotted.split(".")
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value

    return change


def drop(dotted: str) -> Callable[[dict[str, Any]], None]:
    """A change that leaves out one setting."""

    def change(table: dict[str, Any]) -> None:
        *path, last = dotted.split(".")
        for name in path:
            table = table[name]
        del table[last]

    return change


def mount(index: int | slice, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the mounts."""

    def change(table: dict[str, Any]) -> None:
        table["fs"]["mounts"][index] = value

    return change


def trust(entry: Any, times: int = 1) -> Callable[[dict[str, Any]], None]:
    """A change that trusts more files."""
    return lambda table: table["sgx"]["trusted_files"].extend([entry] * times)


HASHED = {"uri": "file:tree/x", "sha256": "00" * 32}
HOST = {"path": "/etc", "uri": "file:/etc"}
OTHER_RUNTIME = [{"path": path, "uri": "file:/tmp"} for path in ("/lib", "/lib64")]


@pytest.mark.parametrize(
    "change, words",
    [
        (put("loader.insecure__use_cmdline_argv", True), "insecure__use_cmdline_argv weakens"),
        (put("loader.insecure__use_host_env", True), "insecure__use_host_env weakens"),
        (put("sys.insecure__allow_eventfd", True), "insecure__allow_eventfd weakens"),
        (put("sgx.insecure__rpc_thread_num", 0), "insecure__rpc_thread_num weakens"),
        (put("fs.insecure__keys.default", "00" * 16), "fs.insecure__keys weakens"),
        (put("sys.experimental__enable_flock", True), "experimental__enable_flock weakens"),
        (put("sys.debug__mock_syscalls", []), "debug__mock_syscalls weakens"),
        (put("sgx.debug", True), "sgx.debug is True, expected False"),
        (put("sgx.debug", 0), "sgx.debug is 0, expected False"),
        (drop("sgx.debug"), "sgx.debug is None, expected False"),
        (put("sgx.file_check_policy", "allow_all_but_log"), "expected 'strict'"),
        (drop("sgx.file_check_policy"), "sgx.file_check_policy is None"),
        (put("sgx.allowed_files", ["file:tree/x"]), "sgx.allowed_files is not a setting"),
        (put("sgx.remote_attestation", "none"), "expected 'dcap'"),
        (put("sgx.profile.enable", "main"), "sgx.profile is not a setting"),
        (put("sgx.new_setting", 1), "sgx.new_setting is not a setting"),
        (put("libos.check_invalid_pointers", False), "check_invalid_pointers is not a setting"),
        (put("novel", 1), "novel is not a setting"),
        (put("loader.argv", ["python3"]), "loader.argv is ['python3']"),
        (drop("loader.argv"), "loader.argv is None"),
        (put("loader.argv_src_file", "file:tree/x"), "argv_src_file is not a setting"),
        (put("loader.env_src_file", "file:tree/x"), "env_src_file is not a setting"),
        (put("loader.env.HOME", {"passthrough": True}), "passthrough"),
        (put("loader.env.LD_PRELOAD", "/tmp/x.so"), "LD_PRELOAD"),
        (drop("loader.env.PYTHONPATH"), "loader.env is"),
        (put("loader.log_level", "debug"), "expected 'error'"),
        (put("libos.entrypoint", "/tmp/python3"), "expected '/enclave/bin/python3'"),
        (put("sys.disallow_subprocesses", False), "expected True"),
        (put("sys.enable_sigterm_injection", True), "enable_sigterm_injection is not a setting"),
        (put("sys.allowed_ioctls", [{"request_code": 1}]), "allowed_ioctls is not a setting"),
        (drop("fs.root"), "fs.root is None"),
        (put("fs.root", {"type": "chroot", "uri": "file:/"}), "fs.root is"),
        (mount(slice(0, 1), []), "fs.mounts shows something else"),
        (mount(slice(5, 5), [HOST]), "fs.mounts shows something else"),
        (mount(3, {"path": "/enclave", "uri": "file:/home"}), "fs.mounts shows something else"),
        (mount(1, {"path": "/lib", "uri": "file:/lib"}), "fs.mounts shows something else"),
        (mount(4, {"type": "untrusted_shm", "path": "/tmp", "uri": "dev:/dev/shm"}), "fs.mounts"),
        (put("loader.entrypoint", {"uri": "file:/tmp/libsysdb.so"}), "loader.entrypoint is"),
        (put("loader.entrypoint", "file:/tmp/libsysdb.so"), "loader.entrypoint is"),
        (mount(slice(1, 3), OTHER_RUNTIME), "loader.entrypoint is"),
        (mount(3, "file:tree"), "is not a list of what Gramine takes"),
        (put("sgx.trusted_files", "file:tree/"), "is not a list of what Gramine takes"),
        (trust({"sha256": "00" * 32}), "is not a list of what Gramine takes"),
        (trust("file:/etc/passwd"), "belongs to neither the tree nor Gramine's runtime"),
        (trust({**HASHED, "uri": "file:tree/../x"}), "file:tree/../x is trusted and belongs"),
        (trust("file:tree/x"), "file:tree/x is trusted without a hash"),
        (trust("file:tree/"), "file:tree/ is trusted without a hash"),
        (trust({**HASHED, "sha256": "short"}), "file:tree/x is trusted without a hash"),
        (trust(HASHED, 1996), "has 2000 entries, expected 1 to 1999"),
        (put("sgx.trusted_files", []), "has 0 entries"),
        (put("sgx.enclave_size", "4G"), "enclave_size is '4G'"),
        (put("sgx.enclave_size", "12G"), "a power of two of at least 8G"),
        (put("sgx.enclave_size", "much"), "enclave_size is 'much'"),
        (put("sgx.enclave_size", 8 << 30), "enclave_size is 8589934592"),
        (put("sgx.max_threads", 16), "max_threads is 16, expected at least 162 for 1"),
        (drop("sgx.max_threads"), "max_threads is None"),
        (put("sgx.max_threads", True), "max_threads is True"),
        (put("sgx.max_threads", 4097), "max_threads is 4097, expected at most 4096"),
        (put("sgx.max_threads", 513), "513 threads (sgx.max_threads) with stacks of 8M"),
        (put("sys.stack.size", "256K"), "sys.stack is {'size': '256K'}, expected a size of at"),
        (put("sys.stack.size", "8388607"), "expected a size of at least 8M"),
        (put("sys.stack.size", 8 << 20), "expected a size of at least 8M"),
        (put("sys.stack.size", "1G"), "take more than half of the enclave"),
        (put("sys.stack.guard", "1M"), "and nothing else"),
        (drop("sys.stack"), "sys.stack is None"),
    ],
)
def test_a_breach_is_said(parsed, change, words):
    broken = copy.deepcopy(parsed)
    change(broken)
    found = manifest_rules.breaches(broken)
    assert any(words in sentence for sentence in found), found


def test_stacks_and_threads_may_grow_with_the_enclave(parsed):
    parsed["sgx"]["max_threads"], parsed["sys"]["stack"]["size"] = 512, "8M"
    assert manifest_rules.breaches(parsed) == []
    parsed["sgx"]["max_threads"] = manifest_rules.MAX_THREADS
    parsed["sgx"]["enclave_size"] = "64G"
    assert manifest_rules.breaches(parsed) == []


def test_the_template_says_what_memory_without_edmm_allows():
    template = (Path(manifest.__file__).parent / "enclave.manifest.template").read_text()
    reason, _ = template.split("sgx.edmm_enable = false")
    assert "readable, writable\n# and executable" in reason.rpartition("\n\n")[2]


def test_threads_for_the_machine_that_runs_it(directory):
    sgx = tomllib.loads(manifest.render(manifest.own_part(directory, cpus=4)))
    assert manifest_rules.breaches(sgx, cpus=4) == []
    assert "for 8 processors" in manifest_rules.breaches(sgx, cpus=8)[0]


def test_stale_files(parsed, directory):
    library = directory / "tree/lib/libz.so.1"
    content = library.read_bytes()
    library.write_bytes(content[:-1] + b"!")
    (directory / "tree/packages/extra.pyc").touch()
    (directory / "tree/bin/python3").unlink()
    assert manifest_rules.stale_files(parsed, directory) == [
        "tree/packages/extra.pyc lies in the tree and is not trusted",
        "tree/bin/python3 is trusted and missing",
        "tree/lib/libz.so.1 has changed since it was staged",
    ]


def test_links_do_not_pass_for_files(parsed, directory):
    library = directory / "tree/lib/libz.so.1"
    library.rename(directory / "elsewhere")
    library.symlink_to(directory / "elsewhere")
    assert manifest_rules.stale_files(parsed, directory) == [
        "tree/lib/libz.so.1 is a link; the tree holds files alone"
    ]


# Building, with a small tree and stand-ins for Gramine's tools


@pytest.fixture
def small(monkeypatch) -> None:
    """Makes builds stage a small tree."""
    monkeypatch.setattr(staging, "stage", make_tree)


@pytest.fixture
def tools(monkeypatch, tmp_path) -> Path:
    """An otherwise empty PATH on which a test may put tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(folder: Path, name: str, body: str) -> None:
    """A tool, as a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_build_without_gramine_says_what_was_skipped(small, tools, tmp_path):
    built = build(tmp_path / "out")
    assert (built.entries, built.signed) == (4, False)
    shown = str(built)
    assert "manifest  4 trusted entries, all rules kept" in shown
    for reason in (
        *("`strip` (binutils) is not", "`ld` (binutils) is not"),
        *("gramine-manifest: not", "gramine-sgx-sign is not"),
    ):
        assert reason in shown
    assert building.check(tmp_path / "out") == []
    assert building.is_current(tmp_path / "out")


def test_build_uses_the_tools_that_are_there(small, tools, tmp_path):
    where = "s#{{ gramine.libos }}#/g/libsysdb.so#; s#{{ gramine.runtimedir() }}#/g/runtime/glibc#"
    script(tools, "gramine-manifest", f'sed "{where}" "$1" > "$2"')
    signing = '[ "$1 $2" = "--key $KEY" ] && cp "$4" "$6" && touch enclave.sig'
    key = tmp_path / "key.pem"
    script(tools, "gramine-sgx-sign", signing.replace("$KEY", str(key)))
    out = tmp_path / "out"
    with pytest.raises(BuildError, match="there is no signing key .*key.pem"):
        build(out, Options(key=key))
    key.touch()
    built = build(out, Options(key=key))
    assert built.signed and (out / "enclave.manifest.sgx").exists()
    mounts = building.read_manifest(out)["fs"]["mounts"]
    assert mounts[1]["uri"] == "file:/g/runtime/glibc"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("s#sgx.debug = false#sgx.debug = true#", "sgx.debug is True, expected False"),
        ("s#/dev/shm#/dev#", "fs.mounts shows something else"),
        ("s#[0-9a-f]\\{64\\}#" + "00" * 32 + "#", "has changed since it was staged"),
    ],
)
def test_what_is_signed_is_what_is_checked(small, tools, tmp_path, change, words):
    signing = 'cp "$4" "$6" && touch enclave.sig'
    script(tools, "gramine-sgx-sign", signing)
    key, out = tmp_path / "key.pem", tmp_path / "out"
    key.touch()
    build(out, Options(key=key))
    assert building.check(out) == []
    # The manifest beside it is sound all the while, and `gramine-sgx` does not look at it.
    signed = out / "enclave.manifest.sgx"
    subprocess.run(["/bin/sed", "-i", change, signed], check=True)
    broken = building.check(out)
    assert broken and all(sentence.startswith("enclave.manifest.sgx: ") for sentence in broken)
    assert any(words in sentence for sentence in broken)
    assert cli.main(["check", str(out)]) == 1
    # What the tree holds is not looked at where Gramine does so itself.
    in_tree = "has changed" in words
    assert bool(building.check(out, files=False)) == (not in_tree)
    assert cli.main(["check", "--manifests-only", str(out)]) == (0 if in_tree else 1)
    script(tools, "gramine-sgx-sign", f"{signing} && sed -i '{change}' \"$6\"")
    with pytest.raises(BuildError, match="what was signed breaks rules:\n  enclave.manifest.sgx: "):
        build(out, Options(key=key))


def test_build_without_a_key_is_not_signed(small, tools, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    script(tools, "gramine-sgx-sign", "exit 1")
    assert "gramine-sgx-gen-private-key" in str(build(tmp_path / "out"))


def test_a_tool_that_fails_ends_the_build(small, tools, tmp_path):
    script(tools, "gramine-manifest", "echo wrong template >&2; exit 1")
    with pytest.raises(BuildError, match="gramine-manifest failed:\nwrong template"):
        build(tmp_path / "out")


def test_a_tool_that_weakens_ends_the_build(small, tools, tmp_path):
    script(tools, "gramine-manifest", 'sed "s#sgx.debug = false#sgx.debug = true#" "$1" > "$2"')
    with pytest.raises(BuildError, match="sgx.debug is True, expected False"):
        build(tmp_path / "out")


def test_build_replaces_builds_and_nothing_else(small, tools, tmp_path):
    out = tmp_path / "out"
    build(out)
    stale = out / "tree/packages/stale.pyc"
    stale.touch()
    build(out)
    assert not stale.exists()
    (out / "thesis.tex").touch()
    with pytest.raises(BuildError, match=r"holds 'thesis.tex'; name a new or empty folder"):
        build(out)
    assert (out / "thesis.tex").exists()


def test_enclave_size_that_breaks_a_rule(small, tools, tmp_path):
    with pytest.raises(BuildError, match="enclave_size is '9G'"):
        build(tmp_path / "out", Options(enclave_size="9G"))


def test_a_build_of_other_source_is_not_current(small, tools, tmp_path, monkeypatch):
    build(tmp_path / "out")
    monkeypatch.setattr(sys, "version", "3.99")
    assert not building.is_current(tmp_path / "out")
    assert not building.is_current(tmp_path)


def test_the_command(small, tools, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["check", out]) == 1
    assert "enclave_runtime.gramine build --out" in capsys.readouterr().err
    assert cli.main(["build", "--out", out, "--cpus", "2", "--enclave-size", "16G"]) == 0
    assert "skipped   signing" in capsys.readouterr().out
    assert cli.main(["check", out, "--cpus", "2"]) == 0
    assert cli.main(["current", out]) == 0
    capsys.readouterr()
    assert cli.main(["check", out, "--cpus", "64"]) == 1
    assert "expected at least 414 for 64 processors" in capsys.readouterr().out
    (tmp_path / "out/enclave.manifest").write_text("no = toml = here")
    assert cli.main(["check", out]) == 1
    assert "is not TOML" in capsys.readouterr().err
    assert cli.main(["build", "--out", out, "--python", "/no/python"]) == 1
    assert "cannot run /no/python: No such file" in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Iterator[Path]:
    """The real enclave's folder, as the command builds it, in a process of its own."""
    out = tmp_path_factory.mktemp("gramine") / "out"
    command = [sys.executable, "-m", "enclave_runtime.gramine", "build", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(r"manifest  \d+ trusted entries, all rules kept", run.stdout)
    yield out
    shutil.rmtree(out)  # half a gigabyte


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
