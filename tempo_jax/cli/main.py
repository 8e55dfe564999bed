"""The command ``tempo-jax``: serve an enclave, inspect one, check this machine, estimate a step.

For the host's administrator and for a client who wants to see what is there. Exit status 0 is
success, 1 that something is wrong, 2 that the command was not understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tempo_jax import __version__
from tempo_jax.api.estimate import MACHINES
from tempo_jax.cli.doctor import diagnose, format_findings
from tempo_jax.cli.estimate import estimate
from tempo_jax.cli.inspect import inspect, signed_build
from tempo_jax.cli.serve import served
from tempo_jax.errors import LaunchError, TempoError
from tempo_jax.transport.channel import parse_listen
from tempo_jax.transport.launch import KINDS, command

CLIENT_PORT, HOST_PORT = 7441, 7442


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: of the command line; by default this process's.

    Returns:
      The exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except TempoError as error:
        print(f"tempo-jax: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tempo-jax", description="Train JAX models on hardware you do not trust."
    )
    parser.add_argument("--version", action="version", version=f"tempo-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    enclave = commands.add_parser("enclave", help="serve or inspect an enclave")
    actions = enclave.add_subparsers(required=True, metavar="ACTION")

    serve = actions.add_parser(
        "serve",
        help="run an enclave for a client and a host",
        description="Runs an enclave until this command is ended. Its client connects to the "
        "client port from any machine (tempo.Enclave.connect), over TLS with evidence; programs of "
        "this machine attach to the host port (tempo.Enclave.attach).",
    )
    serve.add_argument(
        "--client-address",
        default="127.0.0.1",
        metavar="IP",
        help="numeric address of the client port; 0.0.0.0 for all networks (default: %(default)s)",
    )
    serve.add_argument(
        "--client-port", type=_port, default=CLIENT_PORT, help="0 for any (default: %(default)s)"
    )
    serve.add_argument(
        "--host-port",
        type=_port,
        default=HOST_PORT,
        help="on 127.0.0.1, 0 for any (default: %(default)s)",
    )
    serve.add_argument(
        "--host-key",
        type=Path,
        metavar="FILE",
        help="where to write the key of the host port (default: where Enclave.attach looks)",
    )
    serve.add_argument(
        "--listen",
        metavar="IP:PORT",
        help="one more host port, for processes of the host on other machines; its tensors are not "
        "encrypted there, but blinded as the host sees them (default: none)",
    )
    _add_start(serve)
    serve.add_argument("--json", action="store_true", help="print one JSON object once it serves")
    serve.set_defaults(run=_serve)

    show = actions.add_parser(
        "inspect",
        help="say what an enclave is and what it would prove",
        description="Asks an enclave for evidence and shows it, without owning the enclave. "
        "Nothing is verified against a policy: tempo.Enclave.connect does that. With --local and a "
        "signed build it also shows the measurement that the build's signature names.",
    )
    which = show.add_mutually_exclusive_group(required=True)
    which.add_argument("address", nargs="?", metavar="ADDRESS", help="HOST:PORT of a client port")
    which.add_argument(
        "--local", action="store_true", help="start an enclave on this machine for the purpose"
    )
    _add_start(show)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(run=_inspect)

    doctor = commands.add_parser(
        "doctor",
        help="check this machine and say what to fix",
        description="Checks JAX, devices, shared memory, Gramine and SGX. Exit status 1 means that "
        "something without which nothing runs is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON array")
    doctor.set_defaults(run=_doctor)

    guess = commands.add_parser(
        "estimate",
        help="say what a step would take, from shapes alone",
        description="Compares a function plain on a device, all in the enclave, and shielded under "
        "each scheme, on a machine that need not be this one, and says which batch makes shielding "
        "worth while. The enclave's speed is measured here once. Imports the module, so name only "
        "code that you trust.",
    )
    guess.add_argument("function", metavar="MODULE:FUNCTION", help="plain or shielded")
    guess.add_argument(
        "--shapes",
        nargs="+",
        required=True,
        metavar="SHAPE",
        help="one for each argument: f32[2048,784], a JSON tree of such, or MODULE:FUNCTION that "
        "makes the argument",
    )
    guess.add_argument(
        "--machine", choices=MACHINES, default="here", help="a device (default: %(default)s)"
    )
    guess.add_argument("--cores", type=int, help="of the enclave (default: those usable here)")
    guess.add_argument("--tflops", type=float, help="peak of the device, instead of the machine's")
    guess.add_argument("--gigabytes-per-second", type=float, help="to the device, likewise")
    guess.add_argument("--json", action="store_true", help="print one JSON object")
    guess.set_defaults(run=_estimate)
    return parser


def _add_start(action: argparse.ArgumentParser) -> None:
    """Options that say what enclave to start."""
    action.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="an ordinary process, or under Gramine (default: %(default)s)",
    )
    action.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="for Gramine, what `python -m enclave_runtime.gramine build` made (default: one in "
        "the cache, built on first use)",
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a port")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    # As Ctrl-C: the context ends the enclave and removes the key.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = command(options.kind, options.directory)
    ports = (options.client_address, options.client_port, options.host_port, options.host_key)
    with served(*ports, start, parse_listen(options.listen)) as enclave:
        process = enclave.child.process
        where = {
            "client": enclave.client,
            "host": enclave.host,
            "host_key": str(enclave.host_key),
            "session": enclave.session,
            "process": process.pid,
            "listens": enclave.listens,
        }
        if options.json:
            print(json.dumps(where), flush=True)
        else:
            others = f"other machines {enclave.listens}\n" if enclave.listens else ""
            print(
                f"enclave       process {process.pid}, session {enclave.session}\n"
                f"client port   {enclave.client}, TLS 1.3\n"
                f"host port     {enclave.host}, key in {enclave.host_key}\n{others}"
                f"See what it proves: tempo-jax enclave inspect {enclave.client}",
                flush=True,
            )
        try:
            status = process.wait()
        except KeyboardInterrupt:
            return 0
    print(f"tempo-jax: the enclave ended with status {status}", file=sys.stderr)
    return 1


def _inspect(options: argparse.Namespace) -> int:
    if options.local:
        start = command(options.kind, options.directory)
        with served(command=start) as enclave:
            found = inspect(enclave.client)
        if start.directory is not None:
            found = dataclasses.replace(found, signed_build=signed_build(start.directory))
    else:
        if options.kind != KINDS[0] or options.directory is not None:
            raise LaunchError("--kind and --directory say what to start; give them with --local")
        found = inspect(options.address)
    print(json.dumps(dataclasses.asdict(found)) if options.json else found)
    return 0 if found.bound else 1


def _estimate(options: argparse.Namespace) -> int:
    given = {
        "cores": options.cores,
        "device_tflops": options.tflops,
        "gigabytes_per_second": options.gigabytes_per_second,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    machine = dataclasses.replace(MACHINES[options.machine], **changes)
    found = estimate(options.function, options.shapes, machine)
    print(found.to_json() if options.json else found)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    findings = diagnose()
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        print(format_findings(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0
