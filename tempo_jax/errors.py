"""The errors of tempo_jax; all derive from `TempoError`.

Messages show shapes, dtypes, names and equations, never values: a value may be secret.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator


class TempoError(Exception):
    """Base of every error that tempo_jax raises on purpose."""


class CostFileError(TempoError, ValueError):
    """A file of measured rates that has none, or those of another version."""


class AttestationError(TempoError):
    """Evidence that does not show the enclave that the policy asks for."""


class EnclaveError(TempoError):
    """The enclave refused a request or failed while answering it."""


class EnclaveDiedError(EnclaveError):
    """The enclave process ended, or its connection broke."""


class ForkedError(EnclaveError):
    """A forked child used an enclave that belongs to its parent, which may go on using it."""


class EnclaveTimeoutError(EnclaveError):
    """The enclave did not answer in time: it is stopped, or its machine overloaded."""


class LaunchError(EnclaveError):
    """An enclave of the wanted kind that cannot be started here; the message says what to do."""


class SharedMemoryError(TempoError):
    """`/dev/shm` is too small for a step."""


class SealedValueError(TempoError):
    """A sealed value that was donated, belongs to another enclave, or was altered."""


class AdmissionError(TempoError):
    """A sealed value that its owner did not allow there, or no more; the text says which."""


class CheckpointError(TempoError):
    """A checkpoint that is altered, of another key or tree, or older than one already seen."""


class SecrecyError(TempoError):
    """A value that should be secret is already known to the host."""


class IntegrityError(TempoError):
    """The devices returned something wrong under `shield(..., verify=True)`; nothing was kept.

    Or it cannot be told, as a leaf on the devices or what meets one is not finite; the text says
    which. That does not count as a lie.
    """


class UnsupportedError(TempoError):
    """A program or argument that cannot be shielded, with the reason and what to do."""


class StaticArgumentError(UnsupportedError, ValueError):
    """A static argument that `jax.jit` refuses as well, with a `ValueError`."""


class NanError(TempoError, FloatingPointError):
    """A result with a NaN under `shield(..., debug_nans=True)`; it says which equation made it."""


class CheckError(TempoError, RuntimeError):
    """A check of the program that failed under `shield(..., reveal_checks=True)`, by its message.

    Nothing was committed; the arguments are as they were.
    """


class RoleError(TempoError):
    """A request that the client's or the host's side cannot make; the other side can."""


class ChannelError(EnclaveError):
    """No channel to the enclave: nothing answers, or it did not accept this peer."""


class PlanWarning(UserWarning):
    """A plan does less than its options suggest; it is right, and `explain` says why."""


class UnprovisionedError(EnclaveError):
    """A program that the enclave's client did not provision."""


# The latest failures inside calls from a user's own jit, with a number each.
_remembered: collections.deque[tuple[int, BaseException]] = collections.deque(maxlen=16)
_numbers = iter(range(1 << 62))


def remember(failure: BaseException) -> None:
    """Notes what `original_errors` may have to raise."""
    _remembered.append((next(_numbers), failure))


@contextlib.contextmanager
def original_errors() -> Iterator[None]:
    """Raises what went wrong inside a user's own `jit` or `scan` as what it is.

    A shielded function that runs inside other compiled code can only fail as that code does: with
    JAX's `JaxRuntimeError`, whatever happened, Ctrl-C included. Around such a call, or as a
    decorator of what makes it, this raises the `TempoError` or `KeyboardInterrupt` itself, with
    JAX's error as its cause.

    Example:
      >>> import tempo_jax as tempo
      >>> with tempo.errors.original_errors():
      ...     pass  # state = jax.jit(train_epoch)(state, batches)
    """
    from jax.errors import JaxRuntimeError

    before = next(_numbers)
    try:
        yield
    except JaxRuntimeError as error:
        later = [failure for number, failure in _remembered if number > before]
        # Of several threads' failures, the one whose words JAX repeats.
        for failure in [f for f in later if str(f) and str(f) in str(error)] + later:
            raise failure from error
        raise
