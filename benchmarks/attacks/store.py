"""Recorded traces on disk, so that a second run need not start enclaves again.

One `.npz` for each trace, named after everything that determines it: settings, and the source of
the library and of the code that records. The files hold keys and plaintext of toy models, for
scoring.
"""

from __future__ import annotations

import hashlib
import pathlib

import numpy as np

import tempo_jax as tempo
from benchmarks.attacks import traces
from benchmarks.attacks.blinding import DenseKey
from benchmarks.attacks.recording import record
from benchmarks.attacks.traces import ProductTruth, ProductView, Trace

VIEW = ("x", "w", "y", "g", "dx", "dw", "x_dual", "g_dual", "g_of_dx")
TRUTH = ("x", "w", "g", "a", "b", "c", "decoys_x", "decoys_g")
RECORDERS = ("audit", "coordinates", "recording", "traces")
ROOT = pathlib.Path(__file__).parents[2]


def _fingerprint() -> str:
    files = [
        *sorted((ROOT / "tempo_jax").rglob("*.py")),
        *sorted((ROOT / "enclave_runtime").rglob("*.py")),
        *(pathlib.Path(__file__).with_name(f"{n}.py") for n in RECORDERS),
        pathlib.Path(__file__).with_name("victims.py"),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def recorded(
    victim: str,
    scheme: tempo.schemes.Scheme,
    seed: int,
    steps: int,
    *,
    batch: int | None,
    cache: pathlib.Path | None,
) -> Trace:
    """`recording.record`, from the cache if it is there; None: no cache."""
    if cache is None:
        return record(victim, scheme, seed, steps, batch=batch, cache=None)
    settings = (traces.VERSION, victim, repr(scheme), scheme.name, seed, steps, batch)
    name = hashlib.sha256((repr(settings) + _fingerprint()).encode()).hexdigest()[:16]
    path = cache / f"{scheme.name}-{victim}-{seed}-{name}.npz"
    if path.exists():
        return load(path)
    trace = record(victim, scheme, seed, steps, batch=batch, cache=cache)
    save(trace, path)
    return trace


def save(trace: Trace, path: pathlib.Path) -> None:
    """Writes a recorded trace with its keys as dense matrices."""
    arrays: dict[str, np.ndarray] = {
        "head": np.array([trace.scheme, trace.victim, str(trace.seed)]),
        "names": np.array(trace.names),
        "steps": np.array(len(trace.views)),
    }
    arrays |= {f"p/{name}": np.asarray(value) for name, value in trace.parameters.items()}
    for t, (views, truths) in enumerate(zip(trace.views, trace.truth, strict=True)):
        arrays |= {f"inputs/{t}": trace.inputs[t], f"labels/{t}": trace.labels[t]}
        for kind, products, fields in (("v", views, VIEW), ("t", truths, TRUTH)):
            for name, product in products.items():
                for field in fields:
                    value = getattr(product, field)
                    if value is not None:
                        arrays[f"{t}/{kind}/{name}/{field}"] = value
                if isinstance(product, ProductTruth):
                    arrays[f"{t}/t/{name}/scales"] = np.array(product.scales)
                    for axis, powers in enumerate(product.powers or ()):
                        arrays[f"{t}/t/{name}/powers{axis}"] = powers
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a run cut short leaves no half of a file.
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)  # pyright: ignore[reportArgumentType]
    partial.replace(path)


def load(path: pathlib.Path) -> Trace:
    """Reads what `save` wrote."""
    with np.load(path) as arrays:
        scheme, victim, seed = (str(x) for x in arrays["head"])
        steps, names = int(arrays["steps"]), tuple(str(n) for n in arrays["names"])

        def read(prefix: str, fields: tuple[str, ...]) -> dict[str, np.ndarray | None]:
            present = {f: f"{prefix}/{f}" for f in fields}
            return {f: arrays[k] if k in arrays.files else None for f, k in present.items()}

        views: list[dict[str, ProductView]] = []
        truths: list[dict[str, ProductTruth]] = []
        for t in range(steps):
            views.append({})
            truths.append({})
            for name in names:
                seen = read(f"{t}/v/{name}", VIEW)
                if seen["x"] is not None:
                    views[-1][name] = ProductView(**seen)
                true = read(f"{t}/t/{name}", TRUTH)
                keys = tuple(DenseKey(k) for k in map(true.pop, "abc") if k is not None)
                truth = ProductTruth(**true)  # pyright: ignore[reportArgumentType]
                truth.keys = keys if len(keys) == 3 else None  # pyright: ignore
                truth.scales = tuple(arrays[f"{t}/t/{name}/scales"])
                if f"{t}/t/{name}/powers0" in arrays.files:
                    a, b, c = (arrays[f"{t}/t/{name}/powers{axis}"] for axis in range(3))
                    truth.powers = a, b, c
                truths[-1][name] = truth
        return Trace(
            scheme,
            victim,
            int(seed),
            names,
            views,
            truths,
            {key[2:]: arrays[key] for key in arrays.files if key.startswith("p/")},
            [arrays[f"inputs/{t}"] for t in range(steps)],
            [arrays[f"labels/{t}"] for t in range(steps)],
            recorded=True,
        )
