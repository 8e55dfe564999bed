"""What a step would take elsewhere, from shapes alone."""

import dataclasses
import gc
import json
import os

import jax
import jax.numpy as jnp
import pytest

import tempo_jax as tempo
from tempo_jax.api.estimate import MACHINES, OF_PEAK
from tempo_jax.cli.main import main
from tempo_jax.errors import UnsupportedError
from tempo_jax.planning.cost import CostModel
from tests.support.descent import step

WIDTH = 1024
WEIGHTS = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 3
MODULE = """
import jax.numpy as jnp
import jax
from tests.support.descent import step

def init():
    return [jnp.ones((1024, 1024), jnp.float32)] * 3
"""


def batch_of(rows):
    return jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)


@pytest.fixture
def shielded(enclave):
    return tempo.shield(step, enclave=enclave)


def test_a_fast_device_makes_shielding_worth_while_and_a_slow_one_does_not(shielded):
    fast = shielded.estimate(WEIGHTS, batch_of(4096), machine="h100")
    here = shielded.estimate(WEIGHTS, batch_of(4096))
    assert fast.batch == here.batch == 4096
    assert {line.name for line in fast.shielded} == set(tempo.schemes.SCHEMES)
    for quick, slow in zip(fast.shielded, here.shielded, strict=True):
        assert quick.share == slow.share and quick.enclave_seconds == slow.enclave_seconds
        assert slow.transfer_seconds == 0
        if quick.share:
            assert quick.seconds < slow.seconds and quick.transfer_seconds > 0
    # Shares cost the enclave more than products of this size.
    assert {line.name for line in fast.shielded if not line.share} <= {"secret_shares"}
    permutation = next(line for line in fast.shielded if line.name == "signed_permutation")
    assert permutation.worthwhile_from is not None and permutation.worthwhile_from <= 4096
    assert fast.plain.seconds < permutation.seconds < fast.inside.seconds


def test_the_batch_named_is_the_first_that_gains(shielded):
    found = shielded.estimate(WEIGHTS, batch_of(4096), machine="h100")
    start = next(x.worthwhile_from for x in found.shielded if x.name == "signed_permutation")
    for rows, gains in ((start, True), (start // 2, False)):
        again = shielded.estimate(WEIGHTS, batch_of(rows), machine="h100")
        line = next(x for x in again.shielded if x.name == "signed_permutation")
        assert (again.inside.seconds > 1.05 * line.seconds) == gains


def test_more_cores_are_faster_and_the_device_counts_half_its_peak(shielded):
    costs, cores = CostModel(), len(os.sched_getaffinity(0))
    machine = tempo.Machine("mine", device_tflops=100, gigabytes_per_second=10, cores=8 * cores)
    assert machine.costs(costs).dot_flops == 8 * costs.dot_flops
    many = shielded.estimate(WEIGHTS, batch_of(512), machine=machine)
    one = shielded.estimate(
        WEIGHTS, batch_of(512), machine=dataclasses.replace(machine, cores=cores)
    )
    assert one.inside.seconds == pytest.approx(8 * many.inside.seconds)
    arithmetic = 8 * 2 * 512 * WIDTH * WIDTH
    assert one.plain.seconds == pytest.approx(arithmetic / (OF_PEAK * 100e12))


def test_a_function_without_state_takes_its_batch_from_the_last_argument(enclave):
    predict = tempo.shield(lambda w, x: jnp.tanh(x @ w[0]) @ w[1], enclave=enclave)
    assert predict.estimate(WEIGHTS, batch_of(96)).batch == 96
    assert tempo.shield(jnp.tanh, enclave=enclave).estimate(1.0).batch is None


def test_a_function_written_for_its_batch_is_estimated_there(enclave):
    function = tempo.shield(lambda w, x: x.reshape(64, WIDTH) @ w[0], enclave=enclave)
    found = function.estimate(WEIGHTS, batch_of(64), machine="a100")
    assert found.inside.seconds > 0
    assert {line.worthwhile_from for line in found.shielded} <= {None, 64}


def test_nothing_runs(enclave, shielded):
    gc.collect()  # what other tests left is freed before
    before = enclave.statistics()
    shielded.estimate(WEIGHTS, batch_of(64))
    assert enclave.statistics()["programs"] == before["programs"]


def test_table_and_json_say_the_same(shielded):
    found = shielded.estimate(WEIGHTS, batch_of(1024), machine="h100")
    text, fields = str(found), json.loads(found.to_json())
    assert text.startswith("`step`, a batch of 1,024, with an H100: an enclave on the cores here")
    for name in ("plain on the device", "all in the enclave", *tempo.schemes.SCHEMES):
        assert f"\n{name} " in text
    assert fields["batch"] == 1024 and fields["machine"]["device_tflops"] == 494
    assert fields["inside"]["seconds"] == found.inside.seconds
    assert [x["name"] for x in fields["shielded"]] == [x.name for x in found.shielded]


def test_refusals_of_machines(shielded):
    with pytest.raises(UnsupportedError, match=r"machine is 'b7', expected one of here, t4"):
        shielded.estimate(WEIGHTS, batch_of(64), machine="b7")
    with pytest.raises(UnsupportedError, match="cores is 0, expected more than 0"):
        tempo.Machine("none", cores=0)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "written_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "written_model"


def test_command(module, capsys, shielded):
    arguments = ["estimate", f"{module}:step", "--shapes", f"{module}:init", "f32[1024,1024]"]
    assert main([*arguments, "--machine", "h100", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = shielded.estimate(WEIGHTS, batch_of(1024), machine="h100")
    assert printed == json.loads(expected.to_json())
    weights = json.dumps(["f32[1024,1024]"] * 3)
    arguments[-2] = weights
    assert main([*arguments, "--tflops", "30", "--cores", "4"]) == 0
    assert "this machine: an enclave on 4 cores; 30 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "shape", "words"),
    [
        ("nowhere:step", "f32[2]", "'nowhere:step' names nothing"),
        ("{}:missing", "f32[2]", "names nothing"),
        ("{}:jax", "f32[2]", "is no function"),
        ("{}:step", "f33[2]", "'f33[2]' is no array, expected a type and its shape"),
        ("{}:step", "{{", "is no JSON"),
        ("{}:step", "f32[2]", "does not take arguments of these shapes"),
    ],
)
def test_command_refuses(module, capsys, function, shape, words):
    shape = shape.replace("{{", "{")
    assert main(["estimate", function.format(module), "--shapes", shape]) == 1
    assert words in capsys.readouterr().err


def test_every_machine_is_named():
    assert "here" in MACHINES and all(machine.name for machine in MACHINES.values())
