"""Why a request is refused: a code that programs act on, and a short text for people.

Both sides use this module. The codes are the wire format's: a number keeps its meaning for good,
and the names of Python's classes stay inside each side. Holds no secret.
"""

from __future__ import annotations

import enum

from enclave_runtime.protocol.wire import Frame, Kind


class ErrorCode(enum.IntEnum):
    """What was wrong, as the peer may know it."""

    INTERNAL = 0  # it failed inside the enclave, or for a reason that has no code here
    WIRE = 1  # the frame does not follow the format
    REQUEST = 2  # the fields are malformed, or the session does not do such a thing
    PROGRAM = 3  # a program that does not follow the format
    RUN = 4  # it does not fit the state of its run
    SHARED_MEMORY = 5  # too small, or a range that is not in it
    DECRYPTION = 6  # a ciphertext failed its authentication
    UNKNOWN_HANDLE = 7  # a handle that names nothing
    CHECKPOINT = 8  # altered, of another key or tree, or older than one already seen
    INTEGRITY = 9  # the devices returned something wrong
    UNPROVISIONED = 10  # a program that the client did not provision
    UNOWNED = 11  # the host comes before the client
    ADMISSION = 12  # a value that its owner did not allow there, or not so often


def refusal(request: int, code: ErrorCode, text: str) -> Frame:
    """The frame that refuses a request."""
    return Frame(Kind.ERROR, request, {"code": int(code), "text": text})


def refused(frame: Frame) -> tuple[ErrorCode, str]:
    """The code and the text of a refusal; a code of a later version reads as `INTERNAL`."""
    code = frame.fields.get("code")
    known = type(code) is int and code in ErrorCode._value2member_map_
    return ErrorCode(code) if known else ErrorCode.INTERNAL, str(frame.fields.get("text", ""))
