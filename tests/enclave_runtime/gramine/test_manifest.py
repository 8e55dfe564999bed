"""The manifest is for production, and the rules say every breach.

The template is read here without the rules' own code.
"""

import copy
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enclave_runtime.gramine import manifest, manifest_rules
from enclave_runtime.protocol import limits


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
    assert sgx["max_threads"] == 16 + 3 + 4 * 8 + 4 + limits.CONNECTIONS


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
        (put("sgx.max_threads", 16), "max_threads is 16, expected at least 195 for 1"),
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
