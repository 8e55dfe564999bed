"""What travels behind the frames of a worker that shares no memory with the enclave.

Its parts of a segment's uploads come behind the request, and those of the downloads go behind the
reply. Both are known from the program: the enclave reads each block straight to its place in
private memory when its header is the very one that is next, and takes nothing else. Trusts nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import numpy as np

from enclave_runtime.protocol.wire import (
    BLOCK,
    Label,
    WireError,
    receive_block,
    send_blocks,
)

_DISCARDED_AT_ONCE = 1 << 20  # bytes


class Cargo:
    """What comes behind one request and goes behind its reply.

    Attributes:
      size: bytes that the request says come behind it.
    """

    def __init__(self, connection: socket.socket | None = None):
        """Begins with none either way; without a connection none can come."""
        self._connection = connection
        self._label = Label(0, 0, 0)
        self._position = 0
        self._outgoing: Sequence[np.ndarray] = ()
        self._left = 0
        self.size = 0

    def announce(self, label: Label, size: int) -> None:
        """Notes what is said to come."""
        self._label, self.size, self._left = label, size, size

    def receive(
        self,
        out: np.ndarray,
        each: Callable[[np.ndarray], object] | None = None,
        part_bytes: int = 1 << 30,
    ) -> None:
        """Receives the next block into a C-contiguous array in private memory.

        Args:
          out: the array.
          each: called with so many bytes of it at a time, as they come.
          part_bytes: how many.

        Raises:
          WireError: another block comes, or it is cut off.
        """
        if self._connection is None:
            raise WireError("nothing can follow this request")
        try:
            receive_block(self._connection, self._label, self._position, out, each, part_bytes)
        except WireError:
            self._left -= BLOCK.size  # by then the header has been read
            raise
        self._left -= BLOCK.size + out.nbytes
        self._position += 1

    def load(self, arrays: Sequence[np.ndarray]) -> None:
        """Notes what is to go behind the reply: C-contiguous arrays that nobody changes."""
        self._outgoing = arrays

    def discard(self) -> None:
        """Reads what nobody took, so that the reply and the next request are understood."""
        buffer = bytearray(min(self._left, _DISCARDED_AT_ONCE))
        while self._connection is not None and self._left > 0:
            received = self._connection.recv_into(buffer, min(self._left, len(buffer)))
            if not received:
                raise ConnectionError("the peer closed the connection")
            self._left -= received

    def send(self) -> None:
        """Sends what was loaded."""
        if self._outgoing:
            assert self._connection is not None
            send_blocks(self._connection, self._label, self._outgoing)
