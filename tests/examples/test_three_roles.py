"""The example of three processes: it works, and what passes between owner and host is sealed."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.common import SCHEMES
from examples.three_roles import __main__ as three_roles
from examples.three_roles import agreement, owner

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_both_sides_shield_alike_under_the_scheme_that_they_are_told(scheme, enclave):
    told = ["--scheme", scheme, "--batch-size", "128", "--exchange", "unused"]
    programs = []
    for _ in ("owner", "host"):
        parser = argparse.ArgumentParser()
        agreement.add_options(parser)
        options = parser.parse_args(told)
        state, (batch, *_) = agreement.shapes(options)
        report = agreement.shielded(enclave, options).explain(state, batch)
        programs.append(report.plan.program)
    assert programs[0] == programs[1]
    assert programs[0].scheme == SCHEMES[scheme]().name


class Started(Exception):
    """The enclave's command was seen."""


@pytest.mark.parametrize(
    "given, started",
    [
        ([], ["--kind", "process"]),
        (
            ["--kind", "gramine-direct", "--directory", "built"],
            ["--kind", "gramine-direct", "--directory", "built"],
        ),
    ],
)
def test_the_enclave_is_of_the_kind_that_was_asked_for(monkeypatch, given, started):
    def popen(command: list[str], **_: object) -> None:
        assert command[-len(started) :] == started
        assert command[2:5] == ["tempo_jax", "enclave", "serve"]
        raise Started

    monkeypatch.setattr(three_roles.subprocess, "Popen", popen)
    with pytest.raises(Started):
        three_roles.main(given)


def test_an_enclave_with_sgx_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        three_roles.main(["--kind", "gramine-sgx"])
    assert "--mrenclave, --collateral" in capsys.readouterr().err


@pytest.mark.slow
def test_owner_leaves_host_trains_owner_opens(tmp_path):
    sizes = ["--batch-size", "128", "--batches", "2", "--steps", "3"]
    command = [sys.executable, "-m", "examples.three_roles", "--folder", str(tmp_path), *sizes]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert "owner: provisioned program" in said and "host: trained 3 steps" in said
    assert "owner: largest difference from plain training" in said
    # What passed through the host's hands.
    files = {path.name: path.read_bytes() for path in (tmp_path / "exchange").iterdir()}
    assert set(files) == {agreement.STATE, agreement.BATCHES, agreement.RESULT}
    options = owner.argparse.Namespace(batch_size=128, batches=2)
    secrets = jax.tree.leaves((agreement.initial_state(), owner.secret_batches(options)))
    identity = json.loads((tmp_path / "laptop" / "identity").read_text())["secret"]
    for content in files.values():
        assert bytes.fromhex(identity) not in content and identity.encode() not in content
        for secret in map(np.asarray, secrets):
            for row in secret.reshape(-1, secret.shape[-1]) if secret.ndim else ():
                assert not row.any() or row.tobytes() not in content
    assert identity not in said + ended.stderr
