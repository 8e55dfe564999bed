"""Who may ask the enclave for what, and who owns it.

Two kinds of peer speak to an enclave that serves. The *client* provisions programs, seals and
opens, over TLS. The *host* carries tensors and starts runs of the programs that the client
provisioned, over loopback and shared memory; it holds no key, so nothing that it may ask for
gives it plaintext. Each port takes its own requests and no others. An enclave that was launched
through a parent's pipe has one port for both, since its client and its host are one process.

A process has one owner for as long as it lives: the first client that gave it the secret of its
session.
"""

from __future__ import annotations

import dataclasses
import threading

from enclave_runtime.crypto.encryption import SECRET_BYTES, SessionKeys, session_keys
from enclave_runtime.protocol.limits import CLIENT_CONNECTIONS, HOST_CONNECTIONS
from enclave_runtime.protocol.requests import RequestError
from enclave_runtime.protocol.wire import Kind, WireError
from enclave_runtime.sessions.session import Session

CLIENT_KINDS = frozenset(
    {
        *(Kind.COMPILE, Kind.PROVISION, Kind.RELEASE, Kind.CALIBRATE, Kind.OPEN),
        *(Kind.CHECKPOINT_KEY, Kind.PREPARE),
    }
)
HOST_KINDS = frozenset(
    {
        *(Kind.MAP, Kind.UNMAP, Kind.FIND, Kind.CALIBRATE, Kind.STATISTICS),
        *(Kind.BEGIN, Kind.JOIN, Kind.SETTLE, Kind.SEGMENT, Kind.COMMIT, Kind.ABORT, Kind.FREE),
        Kind.BEAT,
        # A checkpoint asks for no secret, and a restore for an order that the client encrypted.
        *(Kind.CHECKPOINT, Kind.CHECKPOINT_LEAF, Kind.RESTORE, Kind.RESTORE_LEAF),
    }
)


class UnownedError(RequestError):
    """The host comes before the client."""


@dataclasses.dataclass(frozen=True)
class Role:
    """A kind of peer.

    Attributes:
      name: as the peer's proof names it.
      kinds: what it may ask for.
      connections: how many it may have at a time.
      is_client: whether it holds the session's secret; the reason of a refusal is for such a peer.
    """

    name: str
    kinds: frozenset[Kind]
    connections: int
    is_client: bool

    def check(self, kind: Kind) -> None:
        """Refuses requests that another kind of peer may make.

        Raises:
          RequestError: it is not this one's.
        """
        if kind not in self.kinds and (kind in CLIENT_KINDS or kind in HOST_KINDS):
            raise RequestError(f"{kind.name} is not a request that the {self.name} may make")


CLIENT = Role("client", CLIENT_KINDS, CLIENT_CONNECTIONS, is_client=True)
HOST = Role("host", HOST_KINDS, HOST_CONNECTIONS, is_client=False)
PARENT = Role("host", CLIENT_KINDS | HOST_KINDS, HOST_CONNECTIONS, is_client=True)


class Ownership:
    """The session of this process, once somebody owns it.

    Attributes:
      identity: public name of the session, to which everything sealed in it is bound.
    """

    def __init__(self, identity: str):
        self.identity = identity
        self._lock = threading.Lock()
        self._keys: SessionKeys | None = None
        self._session: Session | None = None

    @property
    def owned(self) -> bool:
        """Whether a client has given its secret."""
        return self._keys is not None

    def claim(self, secret: bytes) -> None:
        """Makes whoever knows the secret the owner, for good.

        Raises:
          WireError: the secret has the wrong length, or somebody owns the enclave already.
        """
        if len(secret) != SECRET_BYTES:
            raise WireError(f"a secret has {len(secret)} bytes, expected {SECRET_BYTES}")
        with self._lock:
            if self._keys is not None:
                raise WireError("a second client tried to own the enclave")
            keys = session_keys(secret)
            self._session = Session(keys, self.identity)
            self._keys = keys

    @property
    def connection_key(self) -> bytes:
        """The key with which the owner proves itself.

        Raises:
          WireError: there is no owner.
        """
        if self._keys is None:
            raise WireError("a client proves itself to an enclave without an owner")
        return self._keys.connection

    @property
    def session(self) -> Session:
        """The session.

        Raises:
          UnownedError: there is no owner yet.
        """
        if self._session is None:
            raise UnownedError(
                "the enclave has no owner yet: its client has to connect and provision first"
            )
        return self._session
