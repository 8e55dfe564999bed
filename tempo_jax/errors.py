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


class ForkedError(EnclaveError):
    """A forked child used an enclave that belongs to its parent, which may go on using it."""


class LaunchError(EnclaveError):
    """An enclave of the wanted kind that cannot be started here; the message says what to do."""


class SharedMemoryError(TempoError):
    """`/dev/shm` is too small for a step."""


class SealedValueError(TempoError):
    """A sealed value that was donated, belongs to another enclave, or was altered."""


class CheckpointError(TempoError):
    """A checkpoint that is altered, of another key or tree, or older than one already seen."""


class SecrecyError(TempoError):
    """A value that should be secret is already known to the host."""


class IntegrityError(TempoError):
    """The devices returned something wrong under `shield(..., verify=True)`; nothing was kept."""


class UnsupportedError(TempoError):
    """A program or argument that cannot be shielded, with the reason and what to do."""


class RoleError(TempoError):
    """A request that the client's or the host's side cannot make; the other side can."""


class ChannelError(EnclaveError):
    """No channel to the enclave: nothing answers, or it did not accept this peer."""


class UnprovisionedError(EnclaveError):
    """A program that the enclave's client did not provision."""
