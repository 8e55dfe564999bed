"""The documentation: the tutorial runs as it stands, and the reference has every public name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tempo_jax as tempo
from tests.support.fresh import ROOT, environment

PAGES = ROOT / "docs" / "pages"
# Modules whose names the reference lists one by one; `errors` it takes whole.
MODULES = {
    "tempo_jax": tempo,
    "tempo_jax.checkpoints": tempo.checkpoints,
    "tempo_jax.schemes": tempo.schemes,
    "tempo_jax.testing": tempo.testing,
}
SUBMODULES = {"checkpoints", "errors", "schemes", "testing"}


def blocks(page: Path) -> list[str]:
    """A page's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_tutorial_runs_as_it_stands():
    code = "\n".join(blocks(PAGES / "tutorial.md"))
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert "step 4: loss" in ended.stdout and "round trips" in ended.stdout


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda page: page.stem)
def test_blocks_of_python_parse(page):
    for block in blocks(page):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    described = re.findall(
        r"^::: (\S+)", "\n".join(p.read_text() for p in PAGES.rglob("*.md")), re.MULTILINE
    )
    assert len(described) == len(set(described)) and "tempo_jax.errors" in described
    public = getattr(MODULES[module], "__all__", None)
    names = public or [n for n in vars(MODULES[module]) if not n.startswith("_")]
    # The registry of schemes is for who writes one, and what another page describes is there.
    missing = {f"{module}.{n}" for n in names if n not in SUBMODULES | {"SCHEMES"}}
    missing -= {*described, *(f"{module}.{d.rpartition('.')[2]}" for d in described)}
    assert not missing


def test_a_broken_link_fails_the_gate(tmp_path):
    """With the very flags that the gate builds the pages with."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    for entry in ROOT.iterdir():  # what pages take in from beside them
        if entry.name not in ("docs", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs/pages/glossary.md").open("a") as page:
        page.write("\n[broken](nowhere.md)\n")
    build = re.search(r'bin/mkdocs" (build [^"]*)"\$scratch/site"', (ROOT / ".ci/run").read_text())
    assert build is not None
    flags = build[1].replace("\\\n", " ").split()
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", *flags, str(tmp_path / "site")],
        env={**environment(), "NO_MKDOCS_2_WARNING": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode != 0 and "nowhere.md" in said
    assert "Aborted with 1 warnings" in said, said  # and no other


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "docs/mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(PAGES)) for page in PAGES.rglob("*.md")}
