"""The demo world's picture server, on loopback.

Every answer is a pure function of the URL's path, drawn when it is asked for. So nothing is stored, and several servers
may serve one port at the same time (``SO_REUSEPORT``): two runs at once do not disturb each other.

| path | answer |
| --- | --- |
| ``/{seed}/{index:06d}.jpg`` (``.png``, ``.webp``) | a good picture |
| ``/{seed}/awkward/{kind}/{index:06d}.{extension}`` | one of ``AWKWARD_KINDS``, as the world has them |
| ``/`` | ``IDENTITY`` |
"""

import argparse
import contextlib
import errno
import io
import logging
import re
import socketserver
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from infra.errors import EXIT_BAD_INPUT, EXIT_DONE, TransientError
from infra.processes import GuardedProcess
from model.tiny.world import draw, scene_at

LOGGER = logging.getLogger(__name__)

HOST = "127.0.0.1"
IDENTITY = b"Lacuna demo world\n"
SLOW_S = 20.0
HUGE_SIDE_PX = 20_000

_START_S = 120.0  # a loaded machine may need long to import; a child that dies is noticed at once
_POLL_S = 0.1
_NUM_CACHED = 512
_READY = "serving the demo world"
_GOOD_PATH = re.compile(r"/(\d{1,18})/(\d{6,9})\.(jpg|png|webp)", re.ASCII)
_AWKWARD_PATH = re.compile(r"/(\d{1,18})/awkward/([a-z_]+)/(\d{6,9})\.([a-z]+)", re.ASCII)
_CONTENT_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 92},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "quality": 92},
}


@dataclass(frozen=True)
class Answer:
    """What the server says to one path.

    Attributes:
        status: HTTP status.
        content_type: Of the body.
        body: What is sent; ``Content-Length`` is its length.
        headers: Further headers.
        silence_s: How long nothing is sent between the headers and the body.
    """

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    silence_s: float = 0.0


def picture_path(seed: int, index: int, extension: str = "jpg") -> str:
    """The path of a good picture."""
    return f"/{seed}/{index:06d}.{extension}"


def awkward_path(seed: int, kind: str, index: int) -> str:
    """The path of an awkward picture; ``kind`` is one of ``AWKWARD_KINDS``."""
    return f"/{seed}/awkward/{kind}/{index:06d}.{AWKWARD_KINDS[kind][0]}"


def answer(path: str) -> Answer:
    """What the server says to a path, without its query string; a pure function."""
    if path == "/":
        return Answer(200, "text/plain", IDENTITY)
    if match := _GOOD_PATH.fullmatch(path):
        seed, index, extension = match.groups()
        return Answer(200, _CONTENT_TYPES[extension], _picture(int(seed), int(index), extension))
    if (match := _AWKWARD_PATH.fullmatch(path)) and match[2] in AWKWARD_KINDS:
        extension, answer_of = AWKWARD_KINDS[match[2]]
        if match[4] == extension:
            return answer_of(int(match[1]), int(match[3]))
    return _missing(0, 0)


@lru_cache(maxsize=_NUM_CACHED)
def _picture(seed: int, index: int, extension: str) -> bytes:
    return _encoded(draw(scene_at(seed, index)), **_SAVE_OPTIONS[extension])


def _encoded(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


def _missing(seed: int, index: int) -> Answer:
    return Answer(404, "text/plain", b"no such picture\n")


def _server_error(seed: int, index: int) -> Answer:
    return Answer(500, "text/plain", b"something broke\n")


def _redirect(seed: int, index: int) -> Answer:
    return Answer(302, "text/plain", b"", {"Location": picture_path(seed, index)})


def _slow(seed: int, index: int) -> Answer:
    return Answer(200, "image/jpeg", _picture(seed, index, "jpg"), silence_s=SLOW_S)


def _html(seed: int, index: int) -> Answer:
    body = b"<!doctype html><html><title>Gone</title><body><p>This picture has moved.</p></body></html>\n"
    return Answer(200, "text/html; charset=utf-8", body)


def _truncated(seed: int, index: int) -> Answer:
    whole = _picture(seed, index, "jpg")
    return Answer(200, "image/jpeg", whole[: len(whole) * 2 // 5])


def _empty(seed: int, index: int) -> Answer:
    return Answer(200, "image/jpeg", b"")


def _huge(seed: int, index: int) -> Answer:
    return Answer(200, "image/png", _huge_png())


@lru_cache(maxsize=1)
def _huge_png() -> bytes:
    """A valid black PNG of one bit a pixel: 400 megapixels in about 50 kB, made row by row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = bytes((1 + HUGE_SIDE_PX // 8) * 100)
    compressor = zlib.compressobj(9)
    data = b"".join(compressor.compress(rows) for _ in range(HUGE_SIDE_PX // 100)) + compressor.flush()
    header = struct.pack(">IIBBBBB", HUGE_SIDE_PX, HUGE_SIDE_PX, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@lru_cache(maxsize=_NUM_CACHED)
def _alpha(seed: int, index: int) -> Answer:
    picture = draw(scene_at(seed, index))
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, (4, 4, picture.width - 4, picture.height - 4))
    picture.putalpha(alpha)
    return Answer(200, "image/png", _encoded(picture, format="PNG"))


@lru_cache(maxsize=_NUM_CACHED)
def _cmyk(seed: int, index: int) -> Answer:
    picture = draw(scene_at(seed, index)).convert("CMYK")
    return Answer(200, "image/jpeg", _encoded(picture, format="JPEG", quality=92))


@lru_cache(maxsize=_NUM_CACHED)
def _animated(seed: int, index: int) -> Answer:
    first = draw(scene_at(seed, index))
    later = [first.transpose(Image.Transpose.FLIP_LEFT_RIGHT), first.transpose(Image.Transpose.ROTATE_180)]
    body = _encoded(first, format="GIF", save_all=True, append_images=later, duration=200, loop=0)
    return Answer(200, "image/gif", body)


@lru_cache(maxsize=_NUM_CACHED)
def _gray(seed: int, index: int) -> Answer:
    picture = draw(scene_at(seed, index)).convert("L")
    return Answer(200, "image/jpeg", _encoded(picture, format="JPEG", quality=92))


def _webp(seed: int, index: int) -> Answer:
    return Answer(200, "image/webp", _picture(seed, index, "webp"))


def _opted_out(seed: int, index: int) -> Answer:
    return Answer(200, "image/jpeg", _picture(seed, index, "jpg"), {"X-Robots-Tag": "noai"})


def _opted_out_noimageai(seed: int, index: int) -> Answer:
    return Answer(200, "image/jpeg", _picture(seed, index, "jpg"), {"X-Robots-Tag": "noimageai"})


# Kind → the extension that its URLs carry, and what is answered.
AWKWARD_KINDS: Mapping[str, tuple[str, Callable[[int, int], Answer]]] = {
    "missing": ("jpg", _missing),
    "server_error": ("jpg", _server_error),
    "redirect": ("jpg", _redirect),
    "slow": ("jpg", _slow),
    "html": ("jpg", _html),
    "truncated": ("jpg", _truncated),
    "empty": ("jpg", _empty),
    "huge": ("png", _huge),
    "alpha": ("png", _alpha),
    "cmyk": ("jpg", _cmyk),
    "animated": ("gif", _animated),
    "gray": ("jpg", _gray),
    "webp": ("webp", _webp),
    "opted_out": ("jpg", _opted_out),
    "opted_out_noimageai": ("jpg", _opted_out_noimageai),
}


class _Handler(BaseHTTPRequestHandler):
    """Sends what ``answer`` says; one connection, one answer (HTTP/1.0)."""

    server_version = "LacunaDemoWorld"
    timeout = 30  # a client that connects and says nothing must not hold its thread for ever

    def do_GET(self) -> None:
        """Sends status, headers and body."""
        self._send(with_body=True)

    def do_HEAD(self) -> None:
        """Sends status and headers."""
        self._send(with_body=False)

    def _send(self, with_body: bool) -> None:
        said = answer(self.path.partition("?")[0])
        self.send_response(said.status)
        self.send_header("Content-Type", said.content_type)
        self.send_header("Content-Length", str(len(said.body)))
        for name, value in said.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and not (said.silence_s and self._client_leaves_within(said.silence_s)):
            self.wfile.write(said.body)

    def _client_leaves_within(self, duration_s: float) -> bool:
        """Waits; the end of what the client sends says that it has closed the connection, and frees the thread."""
        self.connection.settimeout(duration_s)
        try:
            self.connection.recv(1)
        except TimeoutError:
            return False
        finally:
            self.connection.settimeout(self.timeout)
        return True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Logs a request where somebody debugs; the demo asks for thousands of pictures."""
        LOGGER.debug(format, *args)


class DemoWorldServer(ThreadingHTTPServer):
    """The server, bound to loopback; a port that others of its kind serve is shared with them.

    Raises:
        ValueError: Another program has the port.
    """

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_port = True

    def __init__(self, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(_port_taken(port)) from error
            raise

    def server_bind(self) -> None:
        """Binds without asking the name service who we are, which may take seconds without a network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.socket.getsockname()[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is everyday life; anything else is a fault of ours."""
        if isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            LOGGER.debug("%s went away", client_address)
        else:
            LOGGER.exception("could not answer %s", client_address)


def _port_taken(port: int) -> str:
    # The ranges' ends: a suggestion must be a port that the config takes.
    other = port + 1 if port < 65535 else 1024
    return f"source.demo.port: {port} is taken by another program; choose another, e.g. --set source.demo.port={other}"


@contextlib.contextmanager
def running_server(port: int = 0) -> Iterator[int]:
    """Serves the demo world from a thread of this process, for tests.

    Args:
        port: 0 for any free one.

    Yields:
        The port.

    Raises:
        ValueError: Another program has the port.
    """
    with DemoWorldServer(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="demo world")
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def serve_demo_world(port: int) -> Iterator[str]:
    """Serves the demo world from a process of its own, until the block is left or this process dies.

    Args:
        port: On loopback.

    Yields:
        The server's address, such as ``http://127.0.0.1:8763``.

    Raises:
        ValueError: Another program has the port.
        TransientError: The server did not come up.
    """
    ready = threading.Event()

    def listen(line: str) -> None:
        if line.startswith(_READY):
            ready.set()

    argv = [sys.executable, "-m", "preprocessing.demo.server", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="lacuna-demo-") as folder:
        log_path = Path(folder) / "server.log"
        root = Path(__file__).resolve().parents[2]  # where `-m` finds the package, installed or not
        with GuardedProcess(argv, cwd=root, log_path=log_path, on_line=listen, grace_s=2) as process:
            _await_ready(process, ready, port)
            yield f"http://{HOST}:{port}"


def _await_ready(process: GuardedProcess, ready: threading.Event, port: int) -> None:
    deadline = time.monotonic() + _START_S
    while not (ready.wait(_POLL_S) and _answers(port)):
        code = process.poll()
        if code is not None:
            process.wait()  # for the last lines
            if code == EXIT_BAD_INPUT:
                raise ValueError(_port_taken(port))
            raise TransientError(f"the demo world's server ended with {code}: {process.last_lines()}")
        if time.monotonic() > deadline:
            raise TransientError(f"the demo world's server did not answer within {_START_S:.0f} s")


def _answers(port: int) -> bool:
    """Whether a server of the demo world answers.

    Raises:
        ValueError: Something else does: a program that shares its port with everyone.
    """
    # No proxy, whatever the environment says: this is loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{HOST}:{port}/", timeout=5) as response:
            is_ours = response.read(len(IDENTITY) + 1) == IDENTITY
    except urllib.error.HTTPError as error:
        error.close()
        is_ours = False
    except OSError:
        return False
    if not is_ours:
        raise ValueError(_port_taken(port))
    return True


def main(argv: list[str] | None = None) -> int:
    """Serves until it is killed: ``python -m preprocessing.demo.server --port 8763``."""
    parser = argparse.ArgumentParser(description="Serve the demo world's pictures on loopback.")
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args(argv).port
    logging.basicConfig(level=logging.WARNING)
    try:
        server = DemoWorldServer(port)
    except ValueError as error:
        LOGGER.error("%s", error)
        return EXIT_BAD_INPUT
    with server, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write(f"{_READY} at http://{HOST}:{server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever()
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
