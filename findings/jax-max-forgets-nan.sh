#!/usr/bin/env bash
# The maximum of an array that holds a NaN is a number: jnp.max and jnp.min on a CPU forget NaN
# from 4,096 elements on (float32 and float64; of 16-bit floats jnp.min alone), in full reductions
# and along an axis, under jit and op by op. Below 4,096 elements NaN comes out, as the
# documentation of numpy.max says and as JAX 0.9 did at every size. So a check such as
# `jnp.max(deviation / tolerance) <= 1` passes what it was written to catch, and small tests do not
# show it. Sums, `isnan(x).any()` and `all(x <= bound)` are right at every size.
#
# Run with JAX 0.9.0 and 0.10.2 (jaxlib's CPU backend, Python 3.11, x86-64); the same was seen with
# JAX 0.11.2 and 0.12.0.1.
#
# Seen:
#   0.9.0 keeps NaN at 64 to 65536
#   0.10.2 float32 max: keeps NaN up to 4095, loses it from 4096
#   0.10.2 float32 min: keeps NaN up to 4095, loses it from 4096
#   0.10.2 float64 max: keeps NaN up to 4095, loses it from 4096
#   0.10.2 float64 min: keeps NaN up to 4095, loses it from 4096
#   0.10.2 bfloat16 min: keeps NaN up to 4095, loses it from 4096
#   0.10.2 along an axis of 4096x8: lost
#   0.10.2 sum, isnan.any, all(x <= 2): right at 65536
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/probe.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
SIZES = (64, 256, 1024, 4095, 4096, 8192, 65536)
version = jax.__version__


def keeps(reduce, dtype, size):
    x = np.ones(size, dtype)
    x[size // 3] = np.nan
    return bool(np.isnan(np.asarray(jax.jit(reduce)(x), np.float64)))


kept = {
    (name, dtype): [size for size in SIZES if keeps(reduce, dtype, size)]
    for name, reduce in (("max", jnp.max), ("min", jnp.min))
    for dtype in ("float32", "float64", "bfloat16")
}
if version.startswith("0.9."):
    assert all(sizes == list(SIZES) for sizes in kept.values()), kept
    print(version, "keeps NaN at 64 to 65536")
else:
    for name, dtype in (("max", "float32"), ("min", "float32"), ("max", "float64"),
                        ("min", "float64"), ("min", "bfloat16")):
        assert kept[name, dtype] == [64, 256, 1024, 4095], (name, dtype, kept)
        print(f"{version} {dtype} {name}: keeps NaN up to 4095, loses it from 4096")
    assert kept["max", "bfloat16"] == list(SIZES), kept
    wide = np.ones((4096, 8), np.float32)
    wide[5, 3] = np.nan
    assert not np.isnan(np.asarray(jnp.max(wide, axis=0))).any()
    assert not np.isnan(np.asarray(jnp.max(wide, axis=1))).any()
    print(version, "along an axis of 4096x8: lost")
    x = np.ones(65536, np.float32)
    x[777] = np.nan
    assert np.isnan(jnp.sum(x)) and jnp.isnan(x).any() and not jnp.all(x <= 2)
    print(version, "sum, isnan.any, all(x <= 2): right at 65536")
PY

for version in 0.9.0 0.10.2; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version" "numpy==2.3.5"
  JAX_PLATFORMS=cpu "$work/$version/bin/python" "$work/probe.py"
done
