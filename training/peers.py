"""Whether the processes on the other machines are alive: a run whose machine died ends soon, and says why.

A launcher sees the processes of its own machine die. Of another machine's death a process learns nothing by itself: a
collective waits, until a timeout that must be long enough for the slowest compilation. So each process says every few
seconds to rank 0 that it is alive, and rank 0 says so to each; whoever is silent, or gone without a farewell, is lost,
and rank 0 tells the others. A process that waits in a collective for a lost one ends itself.
"""

import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

import torch.distributed as dist
from torch.distributed import distributed_c10d

from infra.child import emit
from infra.errors import EXIT_OUTSIDE_WORLD, TransientError, WalltimeError
from training.stopping import StoppedTogetherError
from training.world import World

LOGGER = logging.getLogger(__name__)

SILENCE_S: Final = 30.0
"""Who says nothing for so long is lost."""

_BEAT_S: Final = 2.0
_POLL_S: Final = 0.25
_GRACE_S: Final = 10.0  # for the main thread, to see for itself: a closed connection is an error in gloo at once
_TOLD_GRACE_S: Final = 45.0  # where a process said why it ends: the others may be about to end for the same reason
_UPLOAD_S: Final = 600.0  # a checkpoint that is nearly there is worth waiting for
_NEWS_S: Final = 5.0
_KEY: Final = "lacuna/peers"
_PLANNED: Final = (StoppedTogetherError, WalltimeError)


@dataclass(eq=False)
class _Link:
    """A connection to one process.

    Attributes:
        connection: Non-blocking.
        rank: Who is there; None until it has said so.
        host: Its machine's name.
        heard: When it last said anything.
        text: What it has said since the last whole line.
    """

    connection: socket.socket
    rank: int | None = None
    host: str = ""
    heard: float = field(default_factory=time.monotonic)
    text: bytes = b""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def say(self, **message: Any) -> None:
        """Sends a line; what a dead connection does not take is not our business, silence is noticed elsewhere."""
        try:
            self.connection.send(json.dumps(message).encode() + b"\n")
        except OSError as error:
            LOGGER.debug("%s was not told: %s", self.name, error)

    def hear(self) -> list[dict[str, Any]] | None:
        """What came, line by line; None if the connection has ended, or brings something else."""
        try:
            received = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not received:
            return None
        self.heard = time.monotonic()
        *lines, self.text = (self.text + received).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None


class Peers:
    """Watches, for the length of a block, over the other processes of a run; does nothing where all are on one machine.

    Where one is lost, the block's own error, if it is torch's, becomes a `TransientError` that names it. A block that
    waits for the lost one in vain is ended: by an error event, and the exit code for the outside world's failures; an
    upload that is under way may end first.

    Args:
        world: This process. It joins its process group within the block.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_needed = world.size > world.local_size
        self._is_over = threading.Event()
        self._has_met = threading.Event()
        self._has_news = threading.Event()
        self._problem = ""
        self._ends_at = float("inf")
        self._farewell: dict[str, Any] = {"end": None}
        self._links: list[_Link] = []
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> Self:
        if self._is_needed:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if not self._is_needed:
            return
        is_torchs = isinstance(error, RuntimeError) and kind is not None and kind.__module__ != "infra.errors"
        if error is not None and dist.is_initialized():
            self._has_met.wait(_NEWS_S)  # else nobody would hear why
        # Others learn of a dead process from their own broken connections, perhaps before we do.
        lost = self._problem if is_torchs and self._has_news.wait(_NEWS_S) else ""
        if kind is not None and not isinstance(error, _PLANNED) and not lost:
            self._farewell = {"end": f"{kind.__name__}: {error}"}
        self._is_over.set()
        self._thread.join()
        if lost:
            raise TransientError(_ended(lost)) from error

    # ------------------------------------------------------------------------------------------- all in the thread

    def _watch(self) -> None:
        listener = None
        selector = selectors.DefaultSelector()
        try:
            if self._world.is_first:
                listener, token = self._listen(), secrets.token_hex(16)
                if not self._publish(listener, token):
                    return
                selector.register(listener, selectors.EVENT_READ, None)
            else:
                link, token = self._connect()
                if link is None:
                    return
                self._add(selector, link)
                self._has_met.set()
            self._go_on(selector, listener, token)
        except OSError as error:
            LOGGER.warning("the processes on other machines are not watched: %s", error)
        finally:
            for link in self._links:
                link.say(**self._farewell)
                link.connection.close()
            if listener is not None:
                listener.close()
            selector.close()

    def _go_on(self, selector: selectors.BaseSelector, listener: socket.socket | None, token: str) -> None:
        next_beat = 0.0
        while not self._is_over.is_set():
            for key, _ in selector.select(_POLL_S):
                if key.data is None:
                    assert listener is not None
                    self._add(selector, _Link(listener.accept()[0]))
                elif key.data in self._links:
                    self._hear(selector, key.data, token)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + _BEAT_S
                for link in self._links:
                    link.say(beat=True)
            for link in self._links:
                if link.rank is not None and now - link.heard > SILENCE_S:
                    self._lose(selector, link, f"{link.name} has said nothing for {now - link.heard:.0f} s", _GRACE_S)
                    break
            if now > self._ends_at:
                self._end()

    def _hear(self, selector: selectors.BaseSelector, link: _Link, token: str) -> None:
        messages = link.hear()
        if messages is None:
            if link.rank is None:  # nobody of ours
                self._remove(selector, link)
            else:
                self._lose(selector, link, f"{link.name} is gone without a word", _GRACE_S)
            return
        for message in messages:
            if link.rank is None:  # a stranger, until the first message proves otherwise
                said, rank = str(message.get("token")).encode(), message.get("rank")
                if not secrets.compare_digest(said, token.encode()) or not isinstance(rank, int):
                    self._remove(selector, link)
                    return
                link.rank, link.host = rank, str(message.get("host"))
                if sum(each.rank is not None for each in self._links) == self._world.size - 1:
                    self._has_met.set()
            elif "end" in message:
                if message["end"] is None:
                    self._remove(selector, link)
                elif "lost" in message:  # rank 0 tells of another one
                    self._lose(selector, link, str(message["end"]), _GRACE_S)
                else:
                    self._lose(selector, link, f"{link.name} ended: {message['end']}", _TOLD_GRACE_S)
                return

    def _lose(self, selector: selectors.BaseSelector, link: _Link, what: str, grace_s: float) -> None:
        self._remove(selector, link)
        if self._problem:
            return  # one reason is enough: the others end because of it
        LOGGER.error("%s", _ended(what))
        self._problem = what
        self._ends_at = time.monotonic() + grace_s
        self._farewell = {"end": what, "lost": True}
        for other in self._links:
            other.say(**self._farewell)
        self._has_news.set()

    def _add(self, selector: selectors.BaseSelector, link: _Link) -> None:
        link.connection.setblocking(False)
        selector.register(link.connection, selectors.EVENT_READ, link)
        self._links.append(link)

    def _remove(self, selector: selectors.BaseSelector, link: _Link) -> None:
        selector.unregister(link.connection)
        link.connection.close()
        self._links.remove(link)

    def _end(self) -> None:
        """The main thread waits for who is lost, and will not come back."""
        try:
            emit({"event": "error", "type": "TransientError", "message": _ended(self._problem)})
            deadline = time.monotonic() + _UPLOAD_S
            for thread in threading.enumerate():
                if thread.name.startswith("commit "):
                    LOGGER.warning("%s: it may end, then this process does", thread.name)
                    thread.join(max(0.0, deadline - time.monotonic()))
        finally:  # also where nobody reads what we say any more
            os._exit(EXIT_OUTSIDE_WORLD)

    # ------------------------------------------------------------------------------------------------ how they meet

    def _listen(self) -> socket.socket:
        """On the address at which the others find rank 0; on all, where that is a service's in front of us."""
        for family, _, _, _, address in socket.getaddrinfo(os.environ["MASTER_ADDR"], 0, type=socket.SOCK_STREAM):
            try:
                return socket.create_server(address[:2], family=family, backlog=self._world.size)
            except OSError as error:
                LOGGER.debug("no listening on %s: %s", address, error)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", 0))

    def _publish(self, listener: socket.socket, token: str) -> bool:
        store = self._await_store()
        if store is None:
            return False
        store.set(_KEY, json.dumps({"port": listener.getsockname()[1], "token": token}))
        return True

    def _connect(self) -> tuple[_Link | None, str]:
        store = self._await_store()
        while store is not None and not store.check([_KEY]):
            if self._is_over.wait(_POLL_S):
                return None, ""
        if store is None:
            return None, ""
        told = json.loads(store.get(_KEY))
        host = os.environ["MASTER_ADDR"]
        link = _Link(socket.create_connection((host, told["port"]), timeout=SILENCE_S), 0, host)
        link.say(token=told["token"], rank=self._world.rank, host=socket.gethostname())
        return link, told["token"]

    def _await_store(self) -> distributed_c10d.Store | None:
        """The process group's own store, once there is one; None if the block ended before."""
        while not dist.is_initialized():
            if self._is_over.wait(_POLL_S):
                return None
        return distributed_c10d._get_default_store()


def _ended(what: str) -> str:
    return f"{what}: the run ends on all machines; the same command goes on from the last checkpoint"
