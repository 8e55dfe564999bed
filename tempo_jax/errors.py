"""The errors of tempo_jax; all derive from `TempoError`.

Messages show shapes, dtypes, names and equations, never values: a value may be secret.
"""


class TempoError(Exception):
    """Base of every error that tempo_jax raises on purpose."""


class AttestationError(TempoError):
    """Evidence that does not show the enclave that the policy asks for."""


class EnclaveError(TempoError):
    """The enclave refused a request or failed while answering it."""


class EnclaveDiedError(EnclaveError):
    """The enclave process ended, or its connection broke."""


class SharedMemoryError(TempoError):
    """`/dev/shm` is too small for a step."""


class SealedValueError(TempoError):
    """A sealed value that was donated, belongs to another enclave, or was altered."""


class SecrecyError(TempoError):
    """A value that should be secret is already known to the host."""


class IntegrityError(TempoError):
    """The devices returned something wrong under `shield(..., verify=True)`; nothing was kept."""


class UnsupportedError(TempoError):
    """A program or argument that cannot be shielded, with the reason and what to do."""
