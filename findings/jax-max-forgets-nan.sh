#!/usr/bin/env bash
# The maximum of an array that holds a NaN is a number: jnp.max and jnp.min on a CPU forget NaN
# from 4,096 elements on (float32 and float64; of 16-bit floats jnp.min alone), in full reductions
# and along an axis, under jit and op by op. Below 4,096 elements NaN comes out, as the
# documentation of numpy.max says and as JAX 0.9 did at every size. So a check such as
# `jnp.max(deviation / tolerance) <= 1` passes what it was written to catch, and small tests do not
# show it. Max pooling forgets it too, and so does an elementwise maximum that the compiler fuses
# into a sum: jit(sum(relu(x))) is finite where x is not, and NaN op by op.
# `isnan(x).any()`, `all(x <= bound)`, and sums without a maximum inside are right at every size.
#
# The cause: from 0.10 on XLA hands such reductions to YNNPACK ("__ynn_fusion" in the compiled
# program). XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (empty) takes it out, and NaN stays;
# --xla_cpu_enable_fast_min_max=false, which JAX sets by default, changes nothing.
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
#   0.10.2 float16 min: keeps NaN up to 4095, loses it from 4096
#   0.10.2 lost op by op, along an axis, in max pooling, and in jit(sum(relu(x)))
#   0.10.2 sum, isnan.any, all(x <= 2): right at 65536
#   0.10.2 with --xla_cpu_enable_fast_min_max=false: loses NaN from 4096
#   0.10.2 with --xla_cpu_experimental_ynn_fusion_type=: keeps NaN at 64 to 65536
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export JAX_PLATFORMS=cpu XLA_FLAGS=

cat > "$work/probe.py" <<'PY'
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

jax.config.update("jax_enable_x64", True)
SIZES = (64, 256, 1024, 4095, 4096, 8192, 65536)
SMALL = [64, 256, 1024, 4095]
version, flags = jax.__version__, os.environ["XLA_FLAGS"]


def with_nan(size, dtype):
    x = np.ones(size, dtype)
    x[size // 3] = np.nan
    return jnp.asarray(x)


def lost(x):
    return bool(np.isfinite(np.asarray(x, np.float64)).all())


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (4,), (4,), "VALID")


kept = {
    (name, dtype): [size for size in SIZES if not lost(jax.jit(reduce)(with_nan(size, dtype)))]
    for name, reduce in (("max", jnp.max), ("min", jnp.min))
    for dtype in ("float32", "float64", "bfloat16", "float16")
}
program = jax.jit(jnp.max).lower(with_nan(4096, "float32")).compile().as_text()
x = with_nan(65536, "float32")
if version.startswith("0.9.") or "ynn" in flags:
    assert all(sizes == list(SIZES) for sizes in kept.values()), kept
    assert "__ynn_fusion" not in program
    assert not lost(jax.jit(lambda x: jax.nn.relu(x).sum())(x)) and not lost(pooled(x))
    print(version, f"with {flags}: keeps" if flags else "keeps", "NaN at 64 to 65536")
elif flags:
    assert kept["max", "float32"] == SMALL, kept
    print(version, f"with {flags}: loses NaN from 4096")
else:
    assert "__ynn_fusion" in program
    for name, dtype in (("max", "float32"), ("min", "float32"), ("max", "float64"),
                        ("min", "float64"), ("min", "bfloat16"), ("min", "float16")):
        assert kept[name, dtype] == SMALL, (name, dtype, kept)
        print(f"{version} {dtype} {name}: keeps NaN up to 4095, loses it from 4096")
    assert kept["max", "bfloat16"] == kept["max", "float16"] == list(SIZES), kept
    assert lost(jnp.max(x)) and lost(pooled(x))
    assert lost(jnp.max(x.reshape(-1, 8), axis=0)) and lost(jnp.max(x.reshape(-1, 8), axis=1))
    assert lost(jax.jit(lambda x: jax.nn.relu(x).sum())(x)) and not lost(jax.nn.relu(x).sum())
    print(version, "lost op by op, along an axis, in max pooling, and in jit(sum(relu(x)))")
    assert not lost(jnp.sum(x)) and jnp.isnan(x).any() and not jnp.all(x <= 2)
    print(version, "sum, isnan.any, all(x <= 2): right at 65536")
PY

for version in 0.9.0 0.10.2; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version" "numpy==2.3.5"
  "$work/$version/bin/python" "$work/probe.py"
done
for flag in --xla_cpu_enable_fast_min_max=false --xla_cpu_experimental_ynn_fusion_type=; do
  XLA_FLAGS=$flag "$work/0.10.2/bin/python" "$work/probe.py"
done
