"""The process in which strangers' files are decoded, and the nursery that forks it: both may die without harm.

Run as ``python -P -m preprocessing.download.decoder FD LIMITS CONFIG``. FD is one end of a socket pair, the parent's
only link to the nursery. The nursery imports the decoders and decodes one small picture of each format, then only
forks: a fresh decoder costs milliseconds. On the nursery's socket:

* the parent says ``F`` with the end of a new socket pair and some memory: the nursery forks a decoder, which alone
  shares both with the parent, and answers its pid;
* the parent says ``E`` and a pid: the nursery kills that decoder, if it has not died already, and answers how it ended
  (a wait status);
* the end of file, which the kernel delivers however the parent dies, ends the nursery, and with it every decoder
  (PR_SET_PDEATHSIG).

On a decoder's socket: for each file where in the shared memory it stands (`REQUEST`), several ahead if one likes; back
come in that order a kind, a length and a body (`ANSWER`). A picture replaces its file; what does not fit there follows
on the socket. Nothing is pickled: what answers has seen a stranger's file, and is not to be trusted with the parent.
Nor can it do harm with the memory: its size is sealed, and the parent copies what it reads there.

A decoder holds no secret and can do nothing but compute: it has no file open but its socket and cannot open another,
be it a file or a connection (RLIMIT_NOFILE), writes no file and no core dump, and starts no process. It may take
``Limits.memory_bytes`` of address space on top of what it was born with, and ``Limits.cpu_s`` of processor time for
each picture.
"""

import contextlib
import ctypes
import gc
import io
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys

import cv2
from PIL import Image

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.containers import ImageRefused
from preprocessing.download.images import NormalizedImage, normalize_image

REQUEST = struct.Struct("<QQQ")  # offset and length of a file, and how much room there is
ANSWER = struct.Struct("<BQ")  # kind, length of the body
PICTURE = struct.Struct("<IIII32sQ")  # width, height, both as they arrived, sha256, length of the picture
WORD = struct.Struct("<ci")  # parent to nursery: F or E, and a pid
STATUS = struct.Struct("<q")  # nursery to parent: a pid, or a wait status
KIND_PICTURE, KIND_REFUSED, KIND_LAST = 1, 2, 3  # LAST: refused, and I end now
# A refusal's body is the reason, a line feed and the detail.
UNKNOWN_PID = -1
MAX_DETAIL_CHARS = 200
NUM_SLOTS = 8  # of the shared memory: files that wait for their turn
SLOT_BYTES = 512 << 10
SHARED_BYTES = NUM_SLOTS * SLOT_BYTES  # or one large file

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20  # of freed memory: more than what one picture of 4 megapixels needs
_PR_SET_PDEATHSIG = 1
_CHECK_PARENT_S = 1.0
_DESCRIPTOR = 3  # of a decoder's socket; 0, 1 and 2 are nothing


def main(link: int, limits: dict[str, float], config: DownloadConfig) -> None:
    """Be the nursery, until the parent is gone.

    Args:
        link: The socket to the parent.
        limits: ``memory_bytes`` and ``cpu_s``.
        config: What pictures are taken.
    """
    parent = os.getppid()
    cv2.setNumThreads(1)  # threads would not survive the fork
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent decides, and its end is ours
        signal.signal(number, signal.SIG_IGN)
    _keep_freed_memory()
    _warm_up(config)
    gc.collect()
    gc.freeze()  # what is shared with the decoders stays shared
    children: set[int] = set()
    with socket.socket(fileno=link) as channel:
        channel.sendall(STATUS.pack(os.getpid()))
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        # A process that the parent has forked may hold the socket open after the parent's death: so look for that, too.
        while os.getppid() == parent:
            if not poll.poll(_CHECK_PARENT_S * 1000):
                continue
            word, descriptors, _, _ = socket.recv_fds(channel, WORD.size, 2)
            if len(word) < WORD.size:
                return
            command, pid = WORD.unpack(word)
            if command == b"F":
                answer = _fork(descriptors[0], descriptors[1], limits, config)
                children.add(answer)
                for descriptor in descriptors:
                    os.close(descriptor)
            else:
                answer = _end(pid) if pid in children else UNKNOWN_PID
                children.discard(pid)
            channel.sendall(STATUS.pack(answer))


def _warm_up(config: DownloadConfig) -> None:
    """Decode one of each, so that a decoder, who can open no file, has everything imported."""
    for kind, mode in (("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "I;16"), ("WEBP", "RGBA"), ("GIF", "P")):
        buffer = io.BytesIO()
        side = config.image_size_px + 16
        Image.new(mode, (side, side)).save(buffer, kind)
        for data in (buffer.getvalue(), b"no", buffer.getvalue()[:-9]):
            with contextlib.suppress(ImageRefused):
                normalize_image(data, config)


def _keep_freed_memory() -> None:
    """Tells the C library to keep what is freed: having it anew from the system costs a quarter of a large picture."""
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


def _fork(link: int, memory: int, limits: dict[str, float], config: DownloadConfig) -> int:
    nursery = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == nursery:
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(null, standard)
            shared = mmap.mmap(memory, SHARED_BYTES)
            os.dup2(link, _DESCRIPTOR)
            # The nursery's own socket among them, and the memory's file: without it nobody can change its size.
            os.closerange(_DESCRIPTOR + 1, os.sysconf("SC_OPEN_MAX"))
            _limit(limits)
            _serve(socket.socket(fileno=_DESCRIPTOR), shared, limits, config)
    finally:
        os._exit(0)  # never back into the nursery's code


def _limit(limits: dict[str, float]) -> None:
    with open("/proc/self/statm", "rb") as file:
        born_with = int(file.read().split()[0]) * resource.getpagesize()
    most = born_with + int(limits["memory_bytes"])
    for kind, value in (
        (resource.RLIMIT_AS, most),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, _DESCRIPTOR + 1),
    ):
        resource.setrlimit(kind, (value, value))


def _serve(link: socket.socket, shared: mmap.mmap, limits: dict[str, float], config: DownloadConfig) -> None:
    """Decode one file after the other, until the parent hangs up."""
    while True:
        head = _receive(link, REQUEST.size)
        if head is None:
            return
        offset, length, room = REQUEST.unpack(head)
        data = shared[offset : offset + length] if length <= room else _receive(link, length)
        if data is None:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        soonest = used.ru_utime + used.ru_stime + limits["cpu_s"]
        # SIGXCPU is deadly; the kernel counts whole seconds.
        resource.setrlimit(resource.RLIMIT_CPU, (max(1, round(soonest + 0.5)), resource.RLIM_INFINITY))
        kind, body, picture = _answer(data, limits, config)
        if len(picture) <= room:
            shared[offset : offset + len(picture)] = picture
        else:
            body += picture
        link.sendall(ANSWER.pack(kind, len(body)) + body)
        if kind == KIND_LAST:
            return
        del data, body, picture  # not kept while we wait


def _receive(link: socket.socket, num_bytes: int) -> bytes | None:
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while view:
        count = link.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return bytes(buffer)


def _answer(data: bytes, limits: dict[str, float], config: DownloadConfig) -> tuple[int, bytes, bytes]:
    """Kind, body and picture; after a failure that nobody foresaw this process is not used again."""
    try:
        picture = normalize_image(data, config)
        return KIND_PICTURE, _packed(picture), picture.image
    except ImageRefused as refused:
        return KIND_REFUSED, _refusal(refused.reason, refused.detail), b""
    except MemoryError:
        detail = f"needed over {int(limits['memory_bytes']) // 1_000_000:,} MB of memory"
        return KIND_LAST, _refusal(Reason.DECODE_OUT_OF_MEMORY, detail), b""
    except Exception as error:  # one strange picture must not end the stage
        return KIND_LAST, _refusal(Reason.IMAGE_BROKEN, f"{type(error).__name__}: {error}"), b""


def _packed(picture: NormalizedImage) -> bytes:
    sizes = (picture.width, picture.height, picture.original_width, picture.original_height)
    return PICTURE.pack(*sizes, bytes.fromhex(picture.sha256), len(picture.image))


def _refusal(reason: Reason, detail: str) -> bytes:
    return f"{reason.value}\n{detail[:MAX_DETAIL_CHARS]}".encode(errors="replace")


def _end(pid: int) -> int:
    """Kill one of ours; one that has died already keeps its own end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it is not buried yet, so the pid is still its own
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), DownloadConfig.model_validate_json(sys.argv[3]))
