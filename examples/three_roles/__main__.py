"""Runs owner, enclave and host as processes of this machine: ``python -m examples.three_roles``."""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from examples.common import add_scheme_option
from tempo_jax.transport.launch import KINDS


def run(module: str, *arguments: str) -> None:
    """Runs a role to its end, as its own process.

    Raises:
      CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves an enclave, lets the owner send, the host train and the owner receive."""
    parser = argparse.ArgumentParser(prog="python -m examples.three_roles", description=__doc__)
    for name, default in (("--batch-size", 256), ("--batches", 4), ("--steps", 40)):
        parser.add_argument(name, type=int, default=default, help="(default: %(default)s)")
    add_scheme_option(parser)
    parser.add_argument(
        "--kind", choices=KINDS, default=KINDS[0], help="of enclave (default: %(default)s)"
    )
    parser.add_argument(
        "--directory",
        metavar="DIR",
        help="for Gramine, what `python -m enclave_runtime.gramine build` made",
    )
    # What the owner asks for where there is SGX; see `owner`.
    parser.add_argument("--mrenclave", metavar="HEX", help="the measurement of the owner's build")
    parser.add_argument("--collateral", metavar="FILE", help="Intel's, for the platform")
    parser.add_argument(
        "--folder", metavar="DIR", help="keep all files there (default: a temporary folder)"
    )
    options = parser.parse_args(arguments)
    if options.kind == "gramine-sgx":
        if options.mrenclave is None or options.collateral is None:
            parser.error(
                "--kind gramine-sgx: say what the owner accepts, --mrenclave, --collateral"
            )
        accepted = ["--mrenclave", options.mrenclave, "--collateral", options.collateral]
    else:
        # There is no SGX to show anything, so the owner is told to take what is there.
        accepted = ["--insecure-accept-no-sgx"]
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        laptop, exchange = (pathlib.Path(folder) / name for name in ("laptop", "exchange"))
        laptop.mkdir()
        exchange.mkdir()
        key = str(pathlib.Path(folder) / "host.key")
        ports = ["--client-port", "0", "--host-port", "0", "--host-key", key]
        serve = [sys.executable, "-m", "tempo_jax", "enclave", "serve", "--json", *ports]
        serve += ["--kind", options.kind]
        serve += ["--directory", options.directory] if options.directory else []
        alike = ["--batch-size", str(options.batch_size), "--batches", str(options.batches)]
        alike += ["--steps", str(options.steps), "--exchange", str(exchange)]
        alike += ["--scheme", options.scheme]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as enclave:
            try:
                line = enclave.stdout.readline() if enclave.stdout else ""
                if not line:
                    raise SystemExit("the enclave did not come up; see its log above")
                where = json.loads(line)
                print(f"enclave: process {where['process']}, {where['client']}", flush=True)
                identity = str(laptop / "identity")
                owned = ["--client", where["client"], "--identity", identity]
                owned += [*accepted, *alike]
                run("examples.three_roles.owner", "send", *owned)
                host = ["--host", where["host"], "--host-key", where["host_key"]]
                run("examples.three_roles.host", *host, *alike)
                run("examples.three_roles.owner", "receive", *owned)
            finally:
                enclave.terminate()


if __name__ == "__main__":
    main()
