"""The enclave as the user meets it: launch, connect or attach; seal, open.

Three ways lead to one, and each gives a role. `connect` is the client's, from any machine: it
has the session's keys and no shared memory, so it provisions, seals and opens. `attach` is the
host's, on the enclave's machine: it has shared memory and no keys, so it runs what was provisioned.
`launch` is both in one process, for development; the path of every byte is the same. Where the
host's devices belong to several processes, `across_processes` gives them one enclave together.

Values that a client and a host hand each other travel as files (`sealing.file`). What lies
blinded on the host's devices comes to the client with its content in the file, and the client
sends it along when it asks the enclave to open it.

Untrusted on the host; the methods that encrypt and decrypt run where the keys are.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import jax
import numpy as np

from enclave_runtime.crypto import encryption
from enclave_runtime.protocol.checkpoint import Seen
from enclave_runtime.protocol.memory import Arena
from enclave_runtime.protocol.program import aligned
from enclave_runtime.protocol.wire import Kind
from tempo_jax.attestation.policy import AttestationPolicy, Verified
from tempo_jax.enclave import values
from tempo_jax.enclave.processes import Processes, new_group
from tempo_jax.enclave.saving import CheckpointRequests
from tempo_jax.errors import (
    ChannelError,
    CheckpointError,
    RoleError,
)
from tempo_jax.jaxprs import cluster
from tempo_jax.planning.calibration import cost_model, doubt, machine_costs
from tempo_jax.planning.cost import CostModel
from tempo_jax.sealing.array import (
    HELD_WHOLE,
    SealedArray,
    handle_text,
    is_sealed,
    owners,
)
from tempo_jax.sealing.handles import Handles
from tempo_jax.sealing.leaves import leaves_of
from tempo_jax.sealing.ledger import CheckpointKey, CheckpointLedger
from tempo_jax.transport import launch as launch_module
from tempo_jax.transport.channel import Channel, parse_address, parse_listen
from tempo_jax.transport.child import Connection
from tempo_jax.transport.host_key import read_host_key
from tempo_jax.transport.identity import ClientIdentity
from tempo_jax.transport.joined import Joined
from tempo_jax.transport.loopback import Attachment, Loopback

# Who seals and opens moves arrays on purpose, which a user's `jax.transfer_guard` is not about.
OWN_TRANSFERS = jax.transfer_guard("allow")


class Enclave:
    """A running enclave and a session with it.

    Make one with `launch` (client and host in one process), `connect` (the client, from any
    machine) or `attach` (the host, on the enclave's machine). A context manager: leaving it ends
    a launched process, and leaves any other running.

    Attributes:
      handles: of the values in it, and who holds them here.
      processes: those that share it, see `across_processes`; None where it is one's own.
    """

    def __init__(
        self,
        connection: Connection | Channel | Attachment | Joined,
        processes: Processes | None = None,
    ):
        """Wraps a connection; users call `launch`, `connect`, `attach` or `across_processes`."""
        self._connection = connection
        self.processes = processes
        self.handles = Handles()
        self._prepared: set[str] = set()
        self._released: collections.deque[int] = collections.deque()
        self._running: set[Future[Any]] = set()
        self._checkpointing = CheckpointRequests()
        # Handles are the host's to count; a client in the same process has only copies of them, and
        # of several processes of a host the first one counts.
        if self.is_host and not self.follows:
            owners[connection.session] = self

    @classmethod
    def launch(
        cls,
        kind: Literal["process", "gramine-direct", "gramine-sgx"] = "process",
        directory: str | os.PathLike[str] | None = None,
        *,
        listen: str | None = None,
        checkpoint_key: CheckpointKey | None = None,
        checkpoint_ledger: CheckpointLedger | None = None,
    ) -> Enclave:
        """Starts an enclave as a child and opens a session with it.

        The child is trusted because this process started it and handed it the session's
        secret through a pipe. It ends when this process does. Started so, even an enclave on SGX
        trusts this machine with the secret: to train on a machine that you do not trust, serve the
        enclave there (``tempo-jax enclave serve``) and `connect` from your own.

        Args:
          kind: ``process`` is ``python -m enclave_runtime``, ``gramine-direct`` the same under
            Gramine without SGX, ``gramine-sgx`` with SGX.
          directory: for Gramine, what ``python -m enclave_runtime.gramine build`` made; by
            default one in the user's cache, built on first use.
          listen: numeric ``address:port`` on which processes of other machines reach the enclave,
            see `across_processes`; ``0.0.0.0:7443`` for all networks, port 0 for any. Who knows the
            key that they get may there ask what a host may, and what crosses is not encrypted: it
            is what the host sees, blinded or revealed.
          checkpoint_key: see `use_checkpoint_key`.
          checkpoint_ledger: likewise.

        Returns:
          The enclave, ready for use.

        Raises:
          LaunchError: this machine cannot start that kind; the message says what to do.
          ChannelError: `listen` is no numeric address with a port.
          EnclaveDiedError: the process ended before it was up.
          EnclaveTimeoutError: it was not up in time.
        """
        where = parse_listen(listen)
        launched = cls(Connection(launch_module.command(kind, directory), where))
        try:
            if checkpoint_key is not None:
                launched.use_checkpoint_key(checkpoint_key, checkpoint_ledger)
        except BaseException:
            launched.close()
            raise
        return launched

    @classmethod
    def connect(
        cls, address: str, *, policy: AttestationPolicy, identity: ClientIdentity | None = None
    ) -> Enclave:
        """Connects the client to an enclave that serves, and owns it or comes back to it.

        Nothing is sent before the enclave's evidence satisfied the policy. An enclave that has no
        owner becomes this identity's for as long as it runs. Keep the identity
        (`enclave.identity.save(path)`) to come back later or from another process: without it
        nothing that was sealed can be opened.

        Args:
          address: of the client port, ``host:port``.
          policy: what the enclave has to prove.
          identity: who the client is; by default a new one.

        Returns:
          The client's side: it seals, opens and provisions. It runs nothing.

        Raises:
          AttestationError: the evidence does not satisfy the policy.
          ChannelError: nothing answers there, or the enclave has another owner.
        """
        return cls(Channel(address, policy, identity or ClientIdentity.generate()))

    @classmethod
    def attach(
        cls, address: str = "127.0.0.1:7442", *, host_key: str | os.PathLike[str] | None = None
    ) -> Enclave:
        """Attaches the host to an enclave that serves on this machine.

        Args:
          address: of the host port, on loopback.
          host_key: the file that `tempo-jax enclave serve` wrote; by default where it does.

        Returns:
          The host's side: it runs what the client provisioned. It has no key, so it neither
          seals nor opens.

        Raises:
          ChannelError: no enclave there accepts this host.
        """
        host, port = parse_address(address)
        if host not in ("127.0.0.1", "localhost"):
            raise ChannelError(
                f"a host attaches on the enclave's own machine, expected 127.0.0.1:PORT, got {host}"
            )
        return cls(Attachment(port, read_host_key(port, host_key)))

    @classmethod
    def across_processes(
        cls, first: Callable[[], Enclave] | None = None, *, share_memory: bool = True
    ) -> Enclave:
        """One enclave for all processes of `jax.distributed`; every process calls this.

        Then ``shield(..., mesh=...)`` takes a mesh of all their devices. All processes make the
        same calls in the same order, with arguments of the same types. The values are those of the
        first process (`jax.process_index() == 0`): the others give arrays of the same shapes, and
        what they hold sealed are stand-ins, and the first process gets what is opened and saved.

        A process on the enclave's machine reaches it over loopback and shared memory. One on
        another machine, or in a container of its own, reaches it over TCP where it was told to
        `listen`, and its devices' parts of what crosses travel there, in the clear: blinded as the
        host sees them. Each process finds out by trying which of the two it is.

        Args:
          first: how the first process comes to the enclave, where it runs on that one's machine;
            by default `launch`. Other processes do not call it.
          share_memory: False has this process's parts travel over TCP even where it could share
            memory; the first process's never do.

        Returns:
          The enclave. With a single process it is simply what `first` gives.

        Raises:
          EnclaveError: the first process got no enclave.
          ChannelError: this one does not reach it.
        """
        first = first or cls.launch
        if jax.process_count() == 1:
            return first()
        processes = Processes()
        if not processes.leads:
            told = processes.hear("enclave")
            lines = Joined(told, cluster.coordinator(), share_memory=share_memory)
            processes.watch(lines, told["group"])
            return cls(lines, processes)
        try:
            enclave = first()
            enclave._lines("`Enclave.across_processes`")
        except BaseException as error:
            processes.tell("enclave", {"failed": str(error)})
            raise
        enclave.processes, group = processes, new_group()
        lines = enclave._lines("an invitation")
        processes.watch(lines, group)
        processes.tell("enclave", lines.invitation() | {"group": group})
        return enclave

    def __enter__(self) -> Enclave:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Enclave({'closed' if self._connection.closed else self._connection})"

    def close(self) -> None:
        """Ends a launched enclave, and with it everything sealed in it; else only leaves."""
        if self.processes is not None:
            self.processes.leave()
        self._connection.close()

    @property
    def session(self) -> str:
        """Public name of the session, to which sealed values are bound."""
        return self._connection.session

    @property
    def connection(self) -> Any:
        """The line to the enclave: `Connection`, `Channel` or `Attachment`."""
        return self._connection

    @property
    def verified(self) -> Verified | None:
        """What the enclave's evidence proved; None for other sides than a connected client's."""
        return self._connection.verified if isinstance(self._connection, Channel) else None

    @property
    def identity(self) -> ClientIdentity | None:
        """Who a connected client is; None for other sides."""
        return self._connection.identity if isinstance(self._connection, Channel) else None

    @property
    def is_client(self) -> bool:
        """Whether this side has the session's keys: it seals, opens and provisions."""
        return self._connection.keys is not None

    @property
    def is_host(self) -> bool:
        """Whether this side shares memory with the enclave: it runs programs."""
        return isinstance(self._connection, Loopback)

    @property
    def follows(self) -> bool:
        """Whether another process leads: what is sealed here are stand-ins for its values."""
        return self.processes is not None and not self.processes.leads

    def check_process(self) -> None:
        """Refuses a forked child of the process that opened this side, which may go on using it.

        Raises:
          ForkedError: this is such a child.
        """
        self._connection.check_process()

    def _leads(self, what: str) -> None:
        if self.follows:
            raise RoleError(
                f"{what} is the first process's, and this is {self.processes!r}: the sealed values "
                "here stand for those of process 0. Do it `if jax.process_index() == 0:`"
            )

    def keys(self, what: str) -> encryption.SessionKeys:
        """The client's keys of the session, for `what`.

        Raises:
          EnclaveError: this enclave was closed.
          RoleError: this is the host's side, or another process than the first.
        """
        self.check_process()
        self._connection.check_open()
        self._leads(what)
        if self._connection.keys is None:
            raise RoleError(
                f"{what} needs the client's keys, and this is the host's side (`Enclave.attach`): "
                "the client does that on its own machine and sends you the sealed values in a "
                "file (`tempo.save_sealed`)"
            )
        return self._connection.keys

    def _lines(self, what: str) -> Loopback:
        self.check_process()
        if not isinstance(self._connection, Loopback):
            raise RoleError(
                f"{what} is the host's work, and this is the client's side (`Enclave.connect`): "
                "run it on the enclave's machine with `Enclave.attach`"
            )
        return self._connection

    @functools.cached_property
    def costs(self) -> CostModel:
        """What the enclave's work costs, from which plans are made.

        A launched enclave's is cached on disk for the machine. One that serves measures once, so
        that its client and its host, who plan apart, plan alike. A file that the variable
        ``TEMPO_JAX_COSTS`` names takes the place of both; client and host need the same.
        """
        if self.follows:
            assert self.processes is not None
            return cost_model(self.processes.hear("costs"))
        if isinstance(self._connection, Connection):
            kind = self._connection.kind
            costs = machine_costs(kind, lambda: self._connection.request(Kind.CALIBRATE, {}))
        else:
            costs = cost_model(self._connection.request(Kind.CALIBRATE, {}))
        if self.processes is not None:
            self.processes.tell("costs", dataclasses.asdict(costs))
        return costs

    def doubt_costs(self) -> str:
        """Has the figures of `costs` measured anew where that is possible.

        Returns:
          What will become of them, as a sentence.
        """
        if isinstance(self._connection, Connection):
            return doubt(self._connection.kind, self.costs)
        return "They were measured by the enclave that serves; another one measures anew."

    def prepare(self, scheme: str) -> None:
        """Has the enclave load a scheme's kernels while a program that takes them is planned."""
        if self.is_client and not self.follows and scheme not in self._prepared:
            self._prepared.add(scheme)
            self._connection.request(Kind.PREPARE, {"scheme": scheme})

    def statistics(self) -> dict[str, Any]:
        """What the enclave reports of itself.

        Returns:
          `handles`, `runs`, `programs` and `blindings` (counts), `peak_memory_bytes`
          (resident; under SGX, and under Gramine for a host that attached, what was mapped),
          `busy_seconds` (inside segments, since launch), `processor_seconds` (of all its threads;
          devices on the same cores slow the former down, and this hardly) and `process` (its id).
        """
        self.free_dropped()
        told = self._lines("`enclave.statistics`").request(Kind.STATISTICS, {})
        if isinstance(self._connection, Connection):
            resident = self._connection.peak_resident_bytes()
            return told if resident is None else {**told, "peak_memory_bytes": resident}
        return told

    # The client's side: plaintext in, plaintext out

    @OWN_TRANSFERS
    def seal(self, tree: Any, *, tag: str | None = None) -> Any:
        """Encrypts every array of a pytree to the enclave.

        Args:
          tree: any pytree of arrays and Python numbers; sealed leaves stay as they are.
          tag: what the pytree is, for an enclave that serves: by default the name of the argument
            that takes it, such as "state". The host can pass what was sealed in one call for that
            argument only, whole, each leaf at its place; so seal each batch in a call of its own.
            See `Shielded.provision`.

        Returns:
          The same pytree, its leaves `SealedArray`.

        Raises:
          UnsupportedError: a leaf is not an array or a number.
          RoleError: this is the host's side.
        """
        return values.seal(self, tree, tag)

    @OWN_TRANSFERS
    def publish(self, tree: Any, *, tag: str) -> Any:
        """Stands for every array of a pytree that is no secret, such as a learning rate.

        The host of an enclave that serves reads what is published (`open`), passes it to arguments
        that are `public`, and cannot change it. A launched enclave takes plain values as well.

        Args:
          tree: any pytree of arrays and Python numbers.
          tag: the argument that takes the pytree, as in `seal`.

        Returns:
          The same pytree, its leaves `SealedArray` of the form "published".

        Raises:
          UnsupportedError: a leaf is not an array or a number.
          RoleError: this is the host's side.
        """
        return values.publish(self, tree, tag)

    @OWN_TRANSFERS
    def open(self, tree: Any) -> Any:
        """Decrypts every sealed leaf of a pytree for the client.

        Of several processes that share the enclave the first one gets the values, and the others
        what they gave. All have to call this where each has a part of a leaf
        (``shield(..., shard_weights=True)``), which they then gather, one leaf at a time.

        Args:
          tree: any pytree; leaves that are not sealed stay as they are.

        Returns:
          The same pytree with a `jax.Array` in place of every `SealedArray`.

        Raises:
          SealedValueError: a leaf was donated, altered, or belongs to another enclave.
          RoleError: this is the host's side, which opens only what is published.
          EnclaveError: another process does not call this, and has to.
        """
        self.free_dropped()
        return values.open_leaves(self, tree)

    @OWN_TRANSFERS
    def copy(self, tree: Any) -> Any:
        """Copies sealed values, so that each lives on when the other is donated.

        `jnp.copy` copies the name of a value in the enclave and not the value. The content passes
        through this client, encrypted on the way. A host without keys copies with
        ``shield(lambda x: x, donate=False)``.

        Args:
          tree: any pytree; leaves that are not sealed stay as they are.

        Returns:
          The same pytree, freshly sealed, without a tag: for a host elsewhere seal what `open`
          returns.

        Raises:
          SealedValueError: a leaf was donated, altered, or belongs to another enclave.
          RoleError: this is the host's side.

        Example:
          >>> import tempo_jax as tempo
          >>> with tempo.Enclave.launch() as enclave:
          ...     state = enclave.seal({"weight": 2.0})
          ...     float(enclave.open(enclave.copy(state))["weight"])
          2.0
        """
        return values.copy(self, tree)

    # Checkpoints

    def use_checkpoint_key(
        self, key: CheckpointKey, ledger: CheckpointLedger | None = None
    ) -> None:
        """Gives the enclave the key for the checkpoints that follow, in place of an earlier one.

        Args:
          key: the client's, the same for all of a training run.
          ledger: what the client has seen; without one, old checkpoints pass for the newest.

        Raises:
          CheckpointError: the key takes the enclave's identity, and it has none outside SGX.
        """
        self._checkpointing.use_key(self, key, ledger)

    @property
    def ledger(self) -> CheckpointLedger:
        """What the client has seen by now; keep it with the newest checkpoint."""
        return self._checkpointing.ledger

    @OWN_TRANSFERS
    def checkpoint(self, tree: Any) -> bytes:
        """Seals a state to the checkpoint key, as bytes that any storage may hold.

        Leaves that lie blinded on the devices are in it as well. The state stays usable. The
        ledger has seen the checkpoint from now on. Of several processes that share the enclave the
        first one gets the checkpoint, and the others none; which have to call this is as for
        `open`.

        Args:
          tree: any pytree of `SealedArray`s.

        Returns:
          The checkpoint; `checkpoints.write` puts it into a file safely. Empty on other processes
          than the first.

        Raises:
          CheckpointError: no key was given, or a leaf is not sealed.
          SealedValueError: a leaf was donated or belongs to another enclave.
          EnclaveError: another process does not call this, and has to.

        Example:
          >>> import tempo_jax as tempo
          >>> key = tempo.CheckpointKey.generate()
          >>> with tempo.Enclave.launch(checkpoint_key=key) as enclave:
          ...     data = enclave.checkpoint(enclave.seal({"step": 3}))
          ...     ledger = enclave.ledger
          >>> with tempo.Enclave.launch(checkpoint_key=key, checkpoint_ledger=ledger) as enclave:
          ...     state = enclave.restore(data, like={"step": 0})
          ...     int(enclave.open(state)["step"])
          3
        """
        self._lines("`enclave.checkpoint`")
        self.free_dropped()
        return self._checkpointing.write(self, tree)

    def restore_order(self, like: Any, *, allow_rollback_to: int | Seen | None = None) -> bytes:
        """The client's leave for its host to restore a checkpoint, once: bytes to send it.

        For a client that is not where the checkpoint is. The order holds for this enclave, for
        states like `like`, and for checkpoints at least as new as the newest in the ledger. It does
        not expire: a host may keep it unused and restore later.

        Args:
          like: see `restore`.
          allow_rollback_to: see `restore`.

        Raises:
          CheckpointError: no checkpoint key was given.
          RoleError: this is the host's side.
        """
        leaves, *_ = leaves_of(like)
        self.keys("allowing a restore")
        return self._checkpointing.order(self, leaves, allow_rollback_to)

    @OWN_TRANSFERS
    def restore(
        self,
        data: bytes,
        like: Any,
        *,
        allow_rollback_to: int | Seen | None = None,
        order: bytes | None = None,
    ) -> Any:
        """Brings a checkpoint's state into this enclave, where it gets fresh blinding keys.

        Args:
          data: what `checkpoint` returned, in this enclave or an earlier one. Of several processes
            that share the enclave, all restore, and the first one's data counts.
          like: a pytree of the same structure, shapes and dtypes: the state as first made, a
            sealed one, or `jax.eval_shape`'s result.
          allow_rollback_to: the number of a checkpoint that is older than the newest that the
            client has seen, to go back to it on purpose; should there be several of the number,
            `key.authenticated(data)` names exactly one.
          order: on the host, what the client's `restore_order` gave; it serves once.

        Returns:
          The pytree with `SealedArray`s.

        Raises:
          CheckpointError: altered or cut; under another key; older than the client has seen; not
            like `like`.
          RoleError: on the host without an `order`; on a client away from the enclave.
        """
        if self.follows:
            _, structure, avals = leaves_of(like)
            return jax.tree.unflatten(structure, [values.stand_in(self, a) for a in avals])
        if not isinstance(data, bytes):
            raise CheckpointError(
                f"enclave.restore: data is a {type(data).__name__}, expected bytes (for an array "
                "of uint8, `np.asarray(array).tobytes()`)"
            )
        self._lines("`enclave.restore`")
        if order is None and not self.is_client:
            raise RoleError(
                "enclave.restore: restoring needs the client's leave. Pass `order=`, which the "
                "client gets from `enclave.restore_order(like)` and sends you"
            )
        return self._checkpointing.restore(self, data, like, allow_rollback_to, order)

    def check_owned(self, sealed: SealedArray) -> SealedArray:
        """Refuses values of other sessions and values already donated.

        Raises:
          SealedValueError: with the reason.
        """
        return values.check_owned(sealed, self.session)

    # Handles

    def adopt(self, handle: Any) -> None:
        """Counts an array that holds a handle; when the last one is dropped, frees the handle."""
        self.handles.adopt(handle)

    def keep(self, sealed: SealedArray) -> None:
        """Keeps what a sealed value names in the enclave, although it may be dropped here.

        For values that lie in files: whoever reads them later still finds them, until a call
        donates them or the enclave ends.
        """
        if sealed.form not in HELD_WHOLE and not self.follows:
            self.handles.keep(handle_text(sealed.handle))

    def donate(self, leaves: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Gives up sealed values that a committed run replaced by `outputs`."""
        kept = {id(x.content) for x in outputs if is_sealed(x)}
        # To delete what an interrupted program is using waits for its end, and holds the
        # interpreter meanwhile, which that program's calls into Python need.
        idle = all(program.done() for program in tuple(self._running))
        for leaf in leaves:
            if not is_sealed(leaf):
                continue
            if leaf.form not in HELD_WHOLE and not self.follows:
                self.handles.drop(handle_text(leaf.handle))
            # A leaf that the step passes through may come back as the very same array.
            mine = isinstance(leaf.content, jax.Array) and id(leaf.content) not in kept
            if mine and idle:
                leaf.content.delete()

    def release(self, program: int) -> None:
        """Frees a provisioned program with one of the next requests; a finalizer may call it.

        Only where client and host are one process. What a client provisions for a host elsewhere
        is kept although the client's function goes, within the enclave's bounds.
        """
        if self.is_client and self.is_host:
            self._released.append(program)

    def runs(self, program: Future[Any]) -> None:
        """Notes a program that uses its inputs until it ends, also if nobody waits for it."""
        self._running.add(program)
        program.add_done_callback(self._running.discard)  # it holds the program's results

    def free_dropped(self) -> None:
        """Tells the enclave which handles and programs nobody holds any more."""
        dropped, released = self.handles.take_dropped(), []
        with contextlib.suppress(IndexError):
            while True:
                released.append(self._released.popleft())
        if self._connection.closed:
            return
        if dropped:
            self._connection.request(Kind.FREE, {"handles": dropped})
        if released:
            self._connection.request(Kind.RELEASE, {"programs": released})

    # For `running.provisioning`, `running.call` and `enclave.checkpoints`

    @contextlib.contextmanager
    def arena(self, size: int) -> Iterator[tuple[str, Arena]]:
        """Shared memory for one request or run."""
        lines = self._lines("what goes through shared memory")
        reserved = lines.reserve(aligned(max(size, 1)))
        name, arena = reserved
        assert name is not None, "the first process shares memory, and the others do not ask"
        try:
            yield name, arena
        except BaseException:
            lines.discard(reserved)
            raise
        lines.give_back(reserved)

    def encrypt(self, content: bytes, purpose: str) -> bytes:
        """Encrypts bytes to the enclave, for one purpose in this session.

        Raises:
          RoleError: this is the host's side.
        """
        context = f"{purpose}|{self.session}".encode()
        key = self.keys("encrypting to the enclave").to_enclave
        return encryption.encrypt_bytes(key, content, context)

    def encrypt_array(self, value: Any) -> np.ndarray:
        """Encrypts an array to the enclave.

        Raises:
          RoleError: this is the host's side.
        """
        key = self.keys("provisioning a program").to_enclave
        return encryption.encrypt_array(key, np.asarray(value), self.session)
