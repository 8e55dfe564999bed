"""Builds the folder that `gramine-direct` and `gramine-sgx` start the enclave from.

Stages the tree, renders the manifest, checks it against `manifest_rules`, and signs it where
Gramine's tools and a key are. What could not be done on this machine is part of the answer, with
the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from enclave_runtime.environment import ENCLAVE_MODULE
from enclave_runtime.gramine import manifest, manifest_rules, staging
from enclave_runtime.gramine.manifest import APPLICATION, MANIFEST, TEMPLATE, TREE
from enclave_runtime.gramine.staging import Staged

SIGNED = f"{MANIFEST}.sgx"  # as Gramine's signing tool leaves it
FINGERPRINT = f"{APPLICATION}.source"
SIGNING_KEY = Path("~/.config/gramine/enclave-key.pem")  # where Gramine's tool generates it

# Packages that come in a distribution of another name.
_DISTRIBUTIONS = {"_cffi_backend": "cffi"}


class BuildError(Exception):
    """A folder that cannot be built; the text says why and what to do."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What can be chosen; all of it is measured.

    Attributes:
      enclave_size: a power of two, at least 8G.
      cpus: of the machine that will run the enclave; None takes this one's.
      product_id: see `sgx.isvprodid` in the template.
      svn: see `sgx.isvsvn` in the template.
      gramine: where Gramine lies on the machine that will sign, if its tools are not here.
      key: the signer's; None takes the one that Gramine's tool generates.
      strip: see `staging.stage`.
    """

    enclave_size: str = manifest.ENCLAVE_SIZE
    cpus: int | None = None
    product_id: int = 1
    svn: int = 1
    gramine: str = manifest.GRAMINE_FOLDER
    key: Path | None = None
    strip: bool = True


@dataclasses.dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
      directory: where.
      staged: what the tree holds.
      entries: trusted files in the manifest.
      signed: whether there is a signature, so that `gramine-sgx` can start it.
      skipped: what was not done, and why.
    """

    directory: Path
    staged: Staged
    entries: int
    signed: bool
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.directory}",
            f"  tree      {self.staged.modules} modules compiled, {self.staged.objects} shared "
            f"objects, {self.staged.size} bytes",
            f"  manifest  {self.entries} trusted entries, all rules kept",
            f"  signed    {'yes' if self.signed else 'no'}",
            *(f"  skipped   {reason}" for reason in self.skipped),
        ]
        return "\n".join(lines)


def build(directory: Path, options: BuildOptions | None = None) -> Built:
    """Builds into a folder; what an earlier build left there is replaced.

    Raises:
      BuildError: the folder holds something else, a tool failed, or a rule is broken.
      StagingError: something to stage is missing.
    """
    options = options or BuildOptions()
    directory = directory.resolve()
    _clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    skipped = []
    staged = staging.stage(directory / TREE, strip=options.strip)
    if options.strip and not staged.stripped:
        skipped.append(
            "stripping: `strip` (binutils) is not on the PATH; start-up hashes more bytes"
        )
    if not staged.ahead:
        skipped.append(
            "compiling kernels: `ld` (binutils) is not on the PATH; the tree holds Numba, so that "
            "start-up hashes a third more bytes, and it compiles in the enclave at the first use"
        )
    template = manifest.own_part(
        directory,
        enclave_size=options.enclave_size,
        cpus=options.cpus,
        product_id=options.product_id,
        svn=options.svn,
    )
    (directory / TEMPLATE).write_text(template)
    tool = shutil.which("gramine-manifest")
    if tool:
        _run(directory, tool, TEMPLATE, MANIFEST)
    else:
        (directory / MANIFEST).write_text(manifest.render(template, options.gramine))
        skipped.append(
            "gramine-manifest: not on the PATH; rendered here for Gramine in "
            f"{options.gramine} (name another folder with --gramine)"
        )
    broken = check(directory, options.cpus)
    if broken:
        raise BuildError("the manifest breaks rules:\n  " + "\n  ".join(broken))
    signed = _sign(directory, options.key, skipped)
    broken = check(directory, options.cpus) if signed else []
    if broken:
        raise BuildError("what was signed breaks rules:\n  " + "\n  ".join(broken))
    (directory / FINGERPRINT).write_text(fingerprint())
    entries = len(read_manifest(directory)["sgx"]["trusted_files"])
    return Built(directory, staged, entries, signed, tuple(skipped))


def fingerprint() -> str:
    """Hash of what the running interpreter would stage: its version, packages and the enclave."""
    versions = {}
    for package in staging.PACKAGES:
        if package != ENCLAVE_MODULE:
            name = _DISTRIBUTIONS.get(package, package)
            versions[name] = importlib.metadata.version(name)
    own = Path(__file__).parent.parent
    sources = {str(p.relative_to(own)): manifest.sha256(p) for p in sorted(own.rglob("*.py"))}
    sources[TEMPLATE] = manifest.sha256(Path(manifest.__file__).with_name(TEMPLATE))
    described = json.dumps([sys.version, versions, sources], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def is_current(directory: Path) -> bool:
    """Whether a folder was built from what the running interpreter would stage now."""
    path = directory / FINGERPRINT
    return path.exists() and path.read_text() == fingerprint()


def read_manifest(directory: Path, name: str = MANIFEST) -> dict[str, Any]:
    """A parsed manifest of a folder.

    Args:
      directory: of the build.
      name: `MANIFEST`, which `gramine-direct` starts, or `SIGNED`.

    Raises:
      BuildError: there is none, or it is not TOML.
    """
    path = directory / name
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise BuildError(
            f"{directory} has no {name}: build it with `python -m enclave_runtime.gramine "
            f"build --out {directory}`"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} is not TOML: {error}") from error


def check(directory: Path, cpus: int | None = None, *, files: bool = True) -> list[str]:
    """Every rule that a built folder breaks, as sentences.

    The manifest and, where there is one, what was signed are held against the rules alike:
    `gramine-sgx` starts the latter and does not look at the former.

    Args:
      directory: of the build.
      cpus: of the machine that will run it; None asks for no more than one needs.
      files: whether the tree is read too, and not the manifests alone.

    Raises:
      BuildError: there is no manifest, or one that cannot be read.
    """
    broken = []
    signed = (directory / SIGNED).exists()
    for name in (MANIFEST, SIGNED) if signed else (MANIFEST,):
        parsed = read_manifest(directory, name)
        found = manifest_rules.breaches(parsed, cpus or 1)
        if files and not found:
            found = manifest_rules.stale_files(parsed, directory)
        broken += [f"{name}: {sentence}" for sentence in found]
    return broken


def _clear(directory: Path) -> None:
    """Removes an earlier build, and nothing else."""
    if not directory.exists():
        return
    own = {TREE, *(path.name for path in directory.glob(f"{APPLICATION}.*"))}
    foreign = sorted({path.name for path in directory.iterdir()} - own)
    if foreign:
        raise BuildError(f"{directory} holds {foreign[0]!r}; name a new or empty folder with --out")
    for name in own:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sign(directory: Path, key: Path | None, skipped: list[str]) -> bool:
    tool = shutil.which("gramine-sgx-sign")
    chosen = (key or SIGNING_KEY).expanduser()
    if tool is None:
        skipped.append("signing: gramine-sgx-sign is not on the PATH; install Gramine")
        return False
    if not chosen.exists():
        if key is not None:
            raise BuildError(f"there is no signing key {key}")
        skipped.append(f"signing: no key {chosen}; make one with gramine-sgx-gen-private-key")
        return False
    _run(
        directory,
        *(tool, "--key", str(chosen), "--manifest", MANIFEST, "--output", SIGNED),
    )
    return True


def _run(directory: Path, *command: str) -> None:
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"{Path(command[0]).name} failed:\n{run.stderr[-2000:]}")
