"""The command ``python -m enclave_runtime.gramine``: build the enclave's folder, check one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import enclave_runtime
from enclave_runtime.gramine import building, manifest
from enclave_runtime.gramine.building import BuildError, BuildOptions
from enclave_runtime.gramine.staging import StagingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      The exit status: 0 is success, 1 that a rule is broken or something is missing.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        return options.run(options, given)
    except (BuildError, StagingError) as error:
        print(f"enclave_runtime.gramine: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m enclave_runtime.gramine")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="stage the enclave, render its manifest, and sign it where Gramine is installed",
    )
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to build")
    build.add_argument(
        "--python", metavar="FILE", help="the interpreter whose packages to stage (default: this)"
    )
    build.add_argument(
        "--enclave-size",
        default=manifest.ENCLAVE_SIZE,
        metavar="SIZE",
        help="a power of two, at least 8G (default: %(default)s)",
    )
    build.add_argument(
        "--cpus", type=int, help="processors of the machine that will run it (default: this one's)"
    )
    build.add_argument("--product-id", type=int, default=1, help="default: %(default)s")
    build.add_argument("--svn", type=int, default=1, help="default: %(default)s")
    build.add_argument(
        "--gramine",
        default=manifest.GRAMINE_FOLDER,
        metavar="DIR",
        help="where Gramine lies on the machine that signs, if it is not installed here "
        "(default: %(default)s)",
    )
    build.add_argument("--key", type=Path, metavar="PEM", help="the signer's key")
    build.add_argument("--no-strip", action="store_true", help="leave symbols in shared objects")
    build.set_defaults(run=_build)

    check = actions.add_parser("check", help="hold a built folder against the rules")
    check.add_argument("directory", type=Path, metavar="DIR")
    check.add_argument("--cpus", type=int, help="processors of the machine that will run it")
    check.add_argument(
        "--manifests-only", action="store_true", help="leave the tree, half a gigabyte, unread"
    )
    check.set_defaults(run=_check)

    current = actions.add_parser(
        "current", help="say whether a folder was built from what is installed now"
    )
    current.add_argument("directory", type=Path, metavar="DIR")
    current.set_defaults(run=_current)
    return parser


def _build(options: argparse.Namespace, given: Sequence[str]) -> int:
    if options.python and Path(options.python).absolute() != Path(sys.executable).absolute():
        # Bytecode fits one version of Python, so the interpreter that will run it builds.
        root = str(Path(enclave_runtime.__file__).resolve().parent.parent)
        search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        module = ["-m", "enclave_runtime.gramine"]
        try:
            os.execve(
                options.python,
                [options.python, *module, *given],
                {**os.environ, "PYTHONPATH": search},
            )
        except OSError as error:
            raise BuildError(f"cannot run {options.python}: {error.strerror}") from error
    built = building.build(
        options.out,
        BuildOptions(
            enclave_size=options.enclave_size,
            cpus=options.cpus,
            product_id=options.product_id,
            svn=options.svn,
            gramine=options.gramine,
            key=options.key,
            strip=not options.no_strip,
        ),
    )
    print(built)
    return 0


def _check(options: argparse.Namespace, _: Sequence[str]) -> int:
    files = not options.manifests_only
    broken = building.check(options.directory, options.cpus, files=files)
    print("\n".join(broken) if broken else f"{options.directory}: all rules kept")
    return 1 if broken else 0


def _current(options: argparse.Namespace, _: Sequence[str]) -> int:
    current = building.is_current(options.directory)
    print(f"{options.directory} is {'current' if current else 'older than what is installed'}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
