"""Building, with a small tree and stand-ins for Gramine's tools."""

import subprocess
import sys

import pytest

from enclave_runtime.gramine import __main__ as cli
from enclave_runtime.gramine import building
from enclave_runtime.gramine.building import BuildError, BuildOptions, build
from tests.support.gramine import script


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
        build(out, BuildOptions(key=key))
    key.touch()
    built = build(out, BuildOptions(key=key))
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
    build(out, BuildOptions(key=key))
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
        build(out, BuildOptions(key=key))


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
        build(tmp_path / "out", BuildOptions(enclave_size="9G"))


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
    assert "expected at least 447 for 64 processors" in capsys.readouterr().out
    (tmp_path / "out/enclave.manifest").write_text("no = toml = here")
    assert cli.main(["check", out]) == 1
    assert "is not TOML" in capsys.readouterr().err
    assert cli.main(["build", "--out", out, "--python", "/no/python"]) == 1
    assert "cannot run /no/python: No such file" in capsys.readouterr().err
