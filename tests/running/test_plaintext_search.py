"""The search for plaintext finds what is planted in random bytes, and nothing in them alone."""

import base64

import numpy as np
import pytest

from tests.support.plaintext_search import FORMATS, Search

RNG = np.random.default_rng(0)
PLAIN = {"w": RNG.normal(size=(40, 24)), "x": np.maximum(RNG.normal(size=(32, 40)), 0)}
LABELS = RNG.integers(0, 10, 64)
SECRET = RNG.bytes(32)
SEARCH = Search({**PLAIN, "y": LABELS}, {"root": SECRET})
NOISE = RNG.bytes(200_003)
AROUND = NOISE[:40_003]  # what is planted; a search takes as long as it has bytes
DTYPES = {form: dtype for form, dtype, *_ in FORMATS}


def planted(content: np.ndarray | bytes, at: int = 15_005) -> bytes:
    content = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
    return AROUND[:at] + content + AROUND[at + len(content) :]


def found(seen: bytes) -> set[tuple[str, str]]:
    return {(f.name, f.how) for f in SEARCH.findings(seen)}


def test_random_bytes_and_random_numbers_hold_nothing():
    numbers = np.random.default_rng(1).normal(size=(64, 40))
    for dtype in DTYPES.values():
        assert not found(planted(numbers.astype(dtype)))
    assert not found(NOISE) and not found(b"") and not found(b"short")


def test_constants_do_not_count():
    common = {
        "zeros": np.zeros((16, 16)),
        "ones": np.ones((16, 16)),
        "third": np.full((16, 16), 1 / 3),
        "count": np.arange(256.0).reshape(16, 16),
        "numbers": np.arange(256),
    }
    search = Search(common)
    for value in common.values():
        for dtype in (*DTYPES.values(), np.dtype("i4")):
            how = {(f.name, f.how) for f in search.findings(planted(value.astype(dtype)))}
            # One value of full precision is found for itself; see the module.
            assert how <= {("third", "element")}


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3, 6])
@pytest.mark.parametrize("name", PLAIN)
def test_copies_in_every_format_at_every_offset(form, offset, name):
    value = PLAIN[name].astype(DTYPES[form])
    assert (name, "copy") in found(planted(value, 16_000 + offset))
    assert (name, "copy") in found(planted(value.T, 16_000 + offset))
    findings = SEARCH.findings(planted(value, 16_000 + offset))
    assert {f.form for f in findings if f.how == "copy"} == {form}


def test_a_single_row_or_element_is_enough():
    w = PLAIN["w"]
    assert ("w", "copy") in found(planted(w[7]))
    assert ("w", "copy") in found(planted(w[:, 5]))
    assert ("w", "element") in found(planted(w[3, 3]))
    assert ("w", "element") in found(planted(w[3, 3:5].astype(np.float32)))
    assert ("w", "element") in found(planted(w[3:5, 3].astype(np.float32)))


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_scaled_copies(form, name):
    value, dtype = PLAIN[name], DTYPES[form]
    rng = np.random.default_rng(2)
    rows, columns = rng.uniform(0.3, 3, (len(value), 1)), rng.uniform(-3, -0.3, value.shape[1])
    for scale in (2.0, -0.37, rows, columns):
        assert (name, "scaled") in found(planted((value * scale).astype(dtype)))


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_permuted_copies(form, name):
    value, dtype = PLAIN[name], DTYPES[form]
    rng = np.random.default_rng(3)
    signs = rng.choice([-1.0, 1.0], value.shape)
    shuffled = rng.permuted(value * signs, axis=1)
    for changed in (
        shuffled,
        shuffled.T,
        rng.permuted(value * signs, axis=0),
        rng.permutation((value * signs).reshape(-1)),
        0.71 * rng.permutation(rng.permutation(value).T),
    ):
        assert (name, "permuted") in found(planted(changed.astype(dtype)))


def test_values_known_up_to_rounding():
    rough = PLAIN["w"] * (1 + 1e-10 * np.random.default_rng(4).normal(size=PLAIN["w"].shape))
    assert {("w", "copy"), ("w", "permuted")} <= found(planted(rough))
    assert not found(planted(PLAIN["w"] + 1e-2 * np.random.default_rng(5).normal(size=(40, 24))))


@pytest.mark.parametrize("form", [*DTYPES, "i1", "i4", "i8", "bool"])
def test_labels_as_numbers_and_one_hot(form):
    one_hot = np.eye(10, dtype=bool)[LABELS]
    search = Search({"y": LABELS, "z": one_hot})
    dtype = np.dtype(DTYPES.get(form, form))
    if form != "bool":
        assert search.findings(planted(LABELS.astype(dtype)))
    assert {f.name for f in search.findings(planted(one_hot.astype(dtype)))} == {"z"}


def test_decimal_text():
    value = float(PLAIN["w"][2, 2])
    assert ("w", "text") in found(planted(f'{{"text": "{value!r}"}}'.encode()))
    assert ("w", "text") in found(planted(f" {value:.12e} ".encode()))
    assert not found(planted(b'{"busy_seconds": 0.123456789012}'))


@pytest.mark.parametrize("lead", range(3))
def test_keys_raw_in_hexadecimal_and_base64(lead):
    for shown in (
        SECRET,
        SECRET[16:],
        SECRET.hex().encode(),
        SECRET.hex().upper().encode(),
        base64.b64encode(bytes(lead) + SECRET + b"after"),
        base64.urlsafe_b64encode(bytes(lead) + SECRET),
    ):
        assert ("root", "secret") in found(planted(shown))
