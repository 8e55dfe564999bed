"""The benchmark of large cases: its table, and how memory is counted."""

import jax

from benchmarks import large
from benchmarks.overhead import ENCLAVE, PLAIN, SHIELDED

STATUS = "Name:\tpython\nVmHWM:\t{} kB\nRssAnon:\t7 kB\nRssShmem:\t{} kB\n"


def test_shared_memory_counts_once():
    assert large.peak_bytes([STATUS.format(3000, 0)]) == 3000 * 1024
    both = [STATUS.format(3000, 400), STATUS.format(5000, 500)]
    assert large.peak_bytes(both) == 7600 * 1024
    assert large.peak_bytes(["VmHWM:\t10 kB\n", "VmHWM:\t20 kB\n"]) == 30 * 1024  # old kernels


def test_the_table_has_ratios_of_the_least():
    def variant(seconds, busy, processor, gigabytes, **more):
        times = {"seconds": seconds, "busy": busy, "processor": processor}
        return times | {"peak_bytes": int(gigabytes * 1e9), **more}

    result = {
        "title": "a model",
        PLAIN: variant([2.5, 2.0], [0.0, 0.0], [0.0, 0.0], 2),
        SHIELDED: variant([3.0, 9.0], [1.0, 0.7], [1.2, 1.5], 3, offloaded=0.876, expected=0.6),
        ENCLAVE: variant([2.0, 2.1], [1.5, 1.4], [3.0, 4.0], 2.5),
    }
    lines = large.table({"environment": large.environment(), "results": [result]}).splitlines()
    assert lines[-1] == (
        "| a model | 0.50 | 0.40 | 2.0 | 88% | 1.50 | 1.00 | 0.7 (1.4; 0.6) | 1.50 (1.25) | 2.00 "
        "| 2 |"
    )
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_cases_have_the_size_that_they_name():
    _, _, batch = large.CASES["perceptron"].build(32)
    assert batch["x"].shape == (32, 2048)
    assert large._tokens(8192)["token"].size == large._tokens(8000)["token"].size == 8192


def test_inference_is_the_models_forward_pass(monkeypatch):
    monkeypatch.setattr(large, "WIDTH", 32)
    monkeypatch.setattr(large, "LENGTH", 8)
    predict, params, batch = large.CASES["inference"].build(16)
    assert batch.keys() == {"token"} and not large.CASES["inference"].carries
    logits, _ = jax.eval_shape(predict, params, batch)
    assert logits.shape == (2, 8, large.VOCABULARY)
