#!/usr/bin/env bash
# While a jax.pure_callback runs, its device does nothing else. On a CPU, where XLA has a pool of
# threads and starts what is ready, one would expect a callback that waits (for a disk, a socket,
# another process) to leave the cores to the rest of the program. Nothing else starts: a product that
# neither needs the callback nor is needed by it is computed after it or before it, never beside it,
# in whichever order the two are written, and two callbacks that have nothing to do with each other
# run one after the other. JAX's page on external callbacks speaks of order and of calls that are
# left out, and says nothing of this.
#
# So work cannot be overlapped with a callback by data flow. What does overlap is a callback that
# starts a thread and returns, with a second one later that waits for the thread; the product
# between them has to depend on what the first one returned, or it is computed before both.
#
# Run with JAX 0.10.2, 0.11.2 and 0.12.0.1 (jaxlib's CPU backend, one device, 2 cores, x86-64).
#
# Seen, for each of the three (0.11.2 and 0.12.0.1 on Python 3.12 and 3.13):
#   a product written behind a callback of 0.6 s is done after it
#   a product written before it is done after it as well
#   two callbacks of 0.6 s each end 0.6 s apart
#   beside a thread that the first callback started the product is done before the thread
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export JAX_PLATFORMS=cpu XLA_FLAGS=

cat > "$work/probe.py" <<'PY'
import threading
import time

import jax
import jax.numpy as jnp

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
WAIT = 0.6  # seconds; the product takes some milliseconds
ended = {}


def callback(name, wait=0.0):
    def run(x):
        time.sleep(wait)
        ended[name] = time.perf_counter()
        return x

    return lambda x: jax.pure_callback(run, SCALAR, x)


def product(matrix, token=0.0):
    return callback("product")(((matrix + token) @ matrix)[0, 0])


def in_order(first, second, function):
    function = jax.jit(function)
    one, matrix = jnp.float32(1), jnp.ones((512, 512), jnp.float32)
    jax.block_until_ready(function(one, matrix))  # compiles
    jax.block_until_ready(function(one, matrix))
    assert ended[first] < ended[second], (first, second)
    return ended[second] - ended[first]


slow, other = callback("slow", WAIT), callback("other", WAIT)
in_order("slow", "product", lambda x, m: (slow(x), product(m)))
print("a product written behind a callback of 0.6 s is done after it")
in_order("slow", "product", lambda x, m: (product(m), slow(x)))
print("a product written before it is done after it as well")
apart = in_order("slow", "other", lambda x, m: (slow(x), other(x + 1)))
assert apart >= 0.9 * WAIT, apart
print("two callbacks of 0.6 s each end 0.6 s apart")


def begin(x):
    def work():
        time.sleep(WAIT)
        ended["thread"] = time.perf_counter()

    threads.append(threading.Thread(target=work))
    threads[-1].start()
    return x * 0


def finish(token, _):
    threads.pop().join()
    return token


def beside(x, m):
    token = jax.pure_callback(begin, SCALAR, x)
    result = product(m, token)
    return jax.pure_callback(finish, SCALAR, token, result)


threads = []
in_order("product", "thread", beside)
print("beside a thread that the first callback started the product is done before the thread")
PY

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
"$work/venv/bin/python" "$work/probe.py" | tee "$work/seen"
diff - "$work/seen" <<'SEEN'
a product written behind a callback of 0.6 s is done after it
a product written before it is done after it as well
two callbacks of 0.6 s each end 0.6 s apart
beside a thread that the first callback started the product is done before the thread
SEEN
