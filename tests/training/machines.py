"""Two machines on one: network namespaces with a cable between them, or, where those are not allowed, two addresses.

Each has an address of its own and scratch of its own. In a namespace it reaches nothing but the other one and, at the
common address, what the host offers there; and its cable can be pulled.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.training.forked_ranks import Node

_HELD = Path("/run/netns")


@dataclass(frozen=True)
class Machine:
    """A place for ranks.

    Attributes:
        address: Its own.
        environment: What a process there must know of its network.
        namespace: Its network; None where it is everybody's.
        cable: The host's end of its cable.
    """

    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    namespace: Path | None = None
    cable: str | None = None

    def node(self, slots: int, workdir: Path, **environment: str) -> Node:
        """Ranks on this machine."""
        return Node(self.address, slots, workdir, {**self.environment, **environment}, self.namespace)

    @contextlib.contextmanager
    def cable_pulled(self) -> Iterator[None]:
        """Within, nothing goes in or out, and nobody is told."""
        assert self.cable is not None, "only where there are namespaces"
        _ip("link", "set", self.cable, "down")
        try:
            yield
        finally:
            _ip("link", "set", self.cable, "up")


@dataclass(frozen=True)
class Machines:
    """Two of them, and what they have in common.

    Attributes:
        host_address: At which they both reach what runs on the host.
        first: One.
        second: The other.
    """

    host_address: str
    first: Machine
    second: Machine

    @property
    def are_apart(self) -> bool:
        """Whether they are namespaces."""
        return self.first.namespace is not None


@contextlib.contextmanager
def two_machines() -> Iterator[Machines]:
    """Two machines for the length of a block: namespaces where that is allowed."""
    with contextlib.ExitStack() as stack:
        try:
            machines = stack.enter_context(_namespaces())
        except (subprocess.CalledProcessError, OSError):
            machines = Machines("127.0.0.1", Machine("127.0.0.2", _on("lo")), Machine("127.0.0.3", _on("lo")))
        yield machines


@contextlib.contextmanager
def _namespaces() -> Iterator[Machines]:
    if shutil.which("ip") is None:
        raise FileNotFoundError("ip")
    name, subnet = f"lac{os.getpid()}", f"10.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
    with contextlib.ExitStack() as undo:
        _ip("link", "add", f"{name}b", "type", "bridge")
        undo.callback(_ip, "link", "del", f"{name}b")
        _ip("addr", "add", f"{subnet}.1/24", "dev", f"{name}b")
        _ip("link", "set", f"{name}b", "up")
        machines = []
        for number in (2, 3):
            namespace, cable = f"{name}n{number}", f"{name}c{number}"
            _ip("netns", "add", namespace)
            undo.callback(_ip, "netns", "del", namespace)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", cable, "master", f"{name}b", "up")
            _ip("-n", namespace, "addr", "add", f"{subnet}.{number}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            machines.append(Machine(f"{subnet}.{number}", _on("eth0"), _HELD / namespace, cable))
        yield Machines(f"{subnet}.1", *machines)


def _on(interface: str) -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": interface}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=60)
