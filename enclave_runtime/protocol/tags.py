"""Tags of sealed values, and the owner's rules about which value may go where, and how often.

The host of an enclave that serves decides which sealed value it hands to which run. A host that
computes honestly and lies about nothing could still hand the optimizer's zeros to a program as its
parameters, read the loss that the program reveals, and so learn each batch's labels; or run the
same batch a thousand times under fresh blindings and average what they leave. Types do not tell
such values apart. So every sealed value has a *tag* that the host can neither make nor change, and
the owner says with each program what its inputs take:

* the *place* names what a value is, by a text. The owner's ``seal(state, tag="state")`` gives the
  leaf at ``[0]['kernel']`` the place ``state[0]['kernel']``. What ``train_step`` returns in place
  of its argument `state` is at ``train_step.state[0]['kernel']``, and what else it returns is at
  ``train_step.result[1]``: the program and the output's position.
* the *origin* is the seal or the committed run that made it. An argument's leaves have one origin,
  so that no tree is put together from two; carried arguments that a run returned together are
  passed on together.
* the *generation* counts the runs that a value has behind it: 0 for what the owner sealed.

By default an argument takes what the owner sealed under the argument's name, at the same place in
the tree, and a carried one also what the same program returned in its place. Everything else is
refused. How often a value may be used is counted for its origin: a carried state once, since what
it becomes is the next generation, and any other argument of a program that carries a state once,
unless the owner says `runs_per_batch`. A run counts when it is committed or when it first shows
the host something in the clear, whichever comes first; one that was aborted before counts as begun
only. One that was aborted after that may be repeated with the very same inputs, which shows what
was shown already but for rounding, and with no others. No more runs are begun on an origin than
count, plus `retries`: each begun run blinds the values anew, and fresh blindings are what guesses
are made from (SECURITY.md, *Guesses*).

Places and seals travel with the ciphertext and are authenticated by it; places and generations are
in checkpoints. Tags of values in the enclave never leave it. Rules come encrypted with the program.
An enclave that was launched gets rules that refuse nothing: its client and its host are one.

A sealed array is 48 bytes of `Seal`, then what `encryption.encrypt_array` makes, bound to them.
A *published* array is one that the host may read and the owner stands for: 48 bytes of `Seal`, 28
bytes that `encryption.encrypt_bytes` makes of nothing, bound to the seal and the content's SHA-256,
and the content as it is. It has a tag like a sealed one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import struct
from typing import Any, NamedTuple

import numpy as np

from enclave_runtime.crypto.encryption import (
    DecryptionError,
    array_context,
    decrypt_array,
    decrypt_bytes,
    encrypt_array,
    encrypt_bytes,
    encrypted_bytes,
)
from enclave_runtime.protocol.fields import items, natural, require

SEAL = struct.Struct(">32s16s")  # 48 bytes
RECORD = struct.Struct(">32s16sQ")  # 56 bytes
ORIGIN_BYTES = 16
NOWHERE = bytes(32)  # the place of what was sealed without a tag
MAX_TEXT = 8192  # characters
MAX_TEXTS = 64  # that one input takes
MAX_RUNS = 1 << 40


@functools.lru_cache(maxsize=1 << 14)  # every run asks for the places of all its leaves
def place_of(text: str) -> bytes:
    """The place that a text names: its SHA-256 under a prefix, 32 bytes."""
    return hashlib.sha256(b"tempo_jax/place|" + text.encode()).digest()


class Seal(NamedTuple):
    """What the owner says of a value when sealing it.

    Attributes:
      place: 32 bytes, see `place_of`; `NOWHERE` for one that it did not tag.
      origin: 16 random bytes that all leaves sealed together share.
    """

    place: bytes
    origin: bytes


class TagRecord(NamedTuple):
    """A tag as a checkpoint keeps it.

    Attributes:
      place: as in `Seal`.
      origin: of the enclave that wrote it; tells which leaves belong together.
      generation: runs that the value has behind it.
    """

    place: bytes
    origin: bytes
    generation: int

    def encode(self) -> bytes:
        """The tag as 56 bytes."""
        return RECORD.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> TagRecord:
        """Inverse of `encode`, for authenticated bytes."""
        return cls(*RECORD.unpack(data))


def seal_bytes(nbytes: int) -> int:
    """How long a sealed array of `nbytes` bytes is."""
    return SEAL.size + encrypted_bytes(nbytes)


def published_bytes(nbytes: int) -> int:
    """How long a published array of `nbytes` bytes is; never longer than a sealed one."""
    return seal_bytes(0) + nbytes


def seal_array(key: bytes, plain: np.ndarray, session: str, seal: Seal) -> np.ndarray:
    """Encrypts an array with its tag, which travels in the clear and cannot be changed.

    Returns:
      uint8[seal_bytes(nbytes)].
    """
    head = SEAL.pack(*seal)
    encrypted = encrypt_array(key, plain, session, bound_to=head)
    return np.concatenate([np.frombuffer(head, np.uint8), encrypted])


def unseal_array(
    key: bytes, sealed: np.ndarray, session: str, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[Seal, np.ndarray]:
    """Inverse of `seal_array`; the array is read-only.

    Raises:
      DecryptionError: altered, or made for another session, shape, dtype or tag.
    """
    head = sealed[: SEAL.size].tobytes()
    if len(head) != SEAL.size:
        raise DecryptionError("a ciphertext failed its authentication")
    plain = decrypt_array(key, sealed[SEAL.size :], session, shape, dtype, bound_to=head)
    return Seal(*SEAL.unpack(head)), plain


def _published_context(
    session: str, head: bytes, content: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> bytes:
    digest = hashlib.sha256(content.data).digest()
    return array_context(session, shape, dtype, b"published|" + head + digest)


def publish_array(key: bytes, plain: np.ndarray, session: str, seal: Seal) -> np.ndarray:
    """Authenticates an array with its tag; both travel in the clear and cannot be changed.

    Returns:
      uint8[published_bytes(nbytes)].
    """
    head, plain = SEAL.pack(*seal), plain.astype(plain.dtype.newbyteorder("="), copy=False)
    content = np.ascontiguousarray(plain).reshape(-1).view(np.uint8)
    proof = encrypt_bytes(
        key, b"", _published_context(session, head, content, plain.shape, plain.dtype)
    )
    return np.concatenate([np.frombuffer(head + proof, np.uint8), content])


def published_array(
    key: bytes, published: np.ndarray, session: str, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[Seal, np.ndarray]:
    """Inverse of `publish_array`.

    Raises:
      DecryptionError: altered, or made for another session, shape, dtype or tag.
    """
    head, proof = (
        published[a:b].tobytes() for a, b in ((0, SEAL.size), (SEAL.size, seal_bytes(0)))
    )
    content = np.ascontiguousarray(published[seal_bytes(0) :])
    decrypt_bytes(key, proof, _published_context(session, head, content, shape, dtype))
    return Seal(*SEAL.unpack(head)), read_published(published, shape, dtype)


def read_published(published: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The content of a published array, which without the key nobody vouches for."""
    content = np.ascontiguousarray(published[seal_bytes(0) :])
    return content.view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ArgumentRule:
    """What one argument of a program takes.

    Attributes:
      name: the argument's.
      inputs: positions of its leaves among the program's inputs.
      texts: for each of them the texts of the places that it takes; None takes anything, and for
        a public argument also what nobody but the host stands for.
      runs: how many runs may use values of one origin; None for any number.
      carried: whether a run returns what takes the argument's place.
    """

    name: str
    inputs: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...] | None
    runs: int | None
    carried: bool

    @classmethod
    def decode(cls, fields: Any, inputs: int) -> ArgumentRule:
        """Reads a rule of a program with so many inputs."""
        require(isinstance(fields, dict), "a rule is not an object")
        positions = tuple(natural(i, inputs, "a rule's input") for i in items(fields["inputs"], ""))
        texts, runs = fields["texts"], fields["runs"]
        if texts is not None:
            texts = tuple(_texts(of_one) for of_one in items(texts, "a rule's places"))
            require(len(texts) == len(positions), "a rule has places for other inputs")
        if runs is not None:
            require(natural(runs, MAX_RUNS, "a rule's runs") > 0, "a rule allows no run")
        require(type(fields["carried"]) is bool, "a rule's carried is not a flag")
        return cls(_text(fields["name"]), positions, texts, runs, fields["carried"])


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a program's inputs take, and what its outputs are.

    Attributes:
      function: the program's name; with an argument's it names what is counted.
      outputs: the text of each sealed output's place.
      arguments: rules that cover every input together, or none where nothing is refused.
      retries: runs that may be begun on an origin beyond those that count.
    """

    function: str
    outputs: tuple[str, ...]
    arguments: tuple[ArgumentRule, ...] = ()
    retries: int = 0

    def encode(self) -> dict[str, Any]:
        """The rules as JSON fields."""
        return dataclasses.asdict(self)

    @classmethod
    def decode(cls, fields: Any, inputs: int, outputs: int) -> Rules:
        """Reads the rules of a program with so many inputs and sealed outputs.

        Raises:
          ProgramError: malformed, or an input without a rule beside others that have one.
        """
        require(isinstance(fields, dict), "a program comes without rules")
        require(fields.keys() == _RULES, "a program's rules have other fields")
        arguments = items(fields["arguments"], "rules")
        require(
            all(isinstance(a, dict) and a.keys() == _ARGUMENT for a in arguments),
            "a rule has other fields",
        )
        rules = cls(
            _text(fields["function"]),
            tuple(_text(t) for t in items(fields["outputs"], "the outputs' places")),
            tuple(ArgumentRule.decode(a, inputs) for a in arguments),
            natural(fields["retries"], MAX_RUNS, "retries"),
        )
        require(len(rules.outputs) == outputs, "rules are for other outputs")
        covered = sorted(i for argument in rules.arguments for i in argument.inputs)
        every = list(range(inputs)) if arguments else []
        require(covered == every, "rules cover other inputs than the program's")
        return rules


_RULES = {field.name for field in dataclasses.fields(Rules)}
_ARGUMENT = {field.name for field in dataclasses.fields(ArgumentRule)}


def _text(value: Any) -> str:
    require(isinstance(value, str) and len(value) <= MAX_TEXT, "a place is no text, or too long")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(map(_text, items(value, "an input's places")))
    require(0 < len(texts) <= MAX_TEXTS, "an input takes too many places, or none")
    return texts
