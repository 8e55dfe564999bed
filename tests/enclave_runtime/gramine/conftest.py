"""A manifest, and stand-ins for what builds one."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enclave_runtime.gramine import building, manifest, staging
from tests.support.gramine import ROOT, make_tree


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
