"""Every answer of the demo world's server, over real HTTP."""

import io
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from model.tiny.world import draw, scene_at
from preprocessing.demo import server as demo
from preprocessing.demo.server import (
    AWKWARD_KINDS,
    HOST,
    HUGE_SIDE_PX,
    IDENTITY,
    answer,
    awkward_path,
    picture_path,
    running_server,
    serve_demo_world,
)

SEED, INDEX = 7, 42


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running_server() as port:
        yield port


def get(port: int, path: str, timeout_s: float = 30, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """One request as it is, without following redirects; all that is sent until the connection closes."""
    connection = HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def get_awkward(port: int, kind: str) -> tuple[int, dict[str, str], bytes]:
    return get(port, awkward_path(SEED, kind, INDEX))


def opened(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body))


def mean_difference(picture: Image.Image) -> float:
    """How far a picture is from the scene that it should show, in levels of 255."""
    scene = np.asarray(draw(scene_at(SEED, INDEX)), dtype=np.float32)
    return float(np.abs(np.asarray(picture.convert("RGB"), dtype=np.float32) - scene).mean())


@pytest.mark.parametrize(("extension", "format_"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_a_good_picture_shows_its_scene(port: int, extension: str, format_: str) -> None:
    status, headers, body = get(port, picture_path(SEED, INDEX, extension))
    picture = opened(body)
    scene = scene_at(SEED, INDEX)
    assert (status, headers["Content-Length"]) == (200, str(len(body)))
    assert headers["Content-Type"] == f"image/{format_.lower()}"
    assert (picture.format, picture.mode, picture.size) == (format_, "RGB", (scene.width_px, scene.height_px))
    assert mean_difference(picture) < 6
    assert (mean_difference(picture) == 0) == (extension == "png")


def test_an_answer_depends_on_the_path_only(port: int) -> None:
    first = get(port, picture_path(SEED, INDEX))[2]
    demo._picture.cache_clear()
    assert get(port, picture_path(SEED, INDEX) + "?copy=1")[2] == first
    assert get(port, picture_path(SEED, INDEX + 1))[2] != first
    assert get(port, picture_path(SEED + 1, INDEX))[2] != first


def test_head_has_the_headers_without_the_body(port: int) -> None:
    length = len(get(port, picture_path(SEED, INDEX))[2])
    status, headers, body = get(port, picture_path(SEED, INDEX), method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, str(length), b"")


@pytest.mark.parametrize(
    "path",
    ["/7", "/7/42.jpg", "/7/000042.bmp", "/7/awkward/nonsense/000042.jpg", "/7/awkward/huge/000042.jpg", "/../etc"],
)
def test_other_paths_are_not_found(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


def test_root_says_who_it_is(port: int) -> None:
    assert get(port, "/")[2] == IDENTITY


def test_missing_and_server_error(port: int) -> None:
    assert get_awkward(port, "missing")[0] == 404
    assert get_awkward(port, "server_error")[0] == 500


def test_redirect_leads_to_a_good_picture(port: int) -> None:
    status, headers, _ = get_awkward(port, "redirect")
    assert (status, headers["Location"]) == (302, picture_path(SEED, INDEX))
    with urllib.request.urlopen(f"http://{HOST}:{port}{awkward_path(SEED, 'redirect', INDEX)}", timeout=30) as response:
        assert response.read() == get(port, picture_path(SEED, INDEX))[2]


def test_slow_sends_its_header_and_then_nothing(port: int) -> None:
    connection = HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request("GET", awkward_path(SEED, "slow", INDEX))
        response = connection.getresponse()
        assert response.status == 200
        assert int(response.headers["Content-Length"]) > 0
        assert connection.sock is not None or response.fp is not None
        response.fp.raw._sock.settimeout(0.5)  # pyright: ignore[reportAttributeAccessIssue]  # no public way
        with pytest.raises(TimeoutError):
            response.read()
    finally:
        connection.close()


def test_slow_frees_its_thread_when_the_client_leaves(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()
    waits = demo._Handler._client_leaves_within

    def observed(handler: demo._Handler, duration_s: float) -> bool:
        has_left = waits(handler, duration_s)
        if has_left:
            left.set()
        return has_left

    monkeypatch.setattr(demo._Handler, "_client_leaves_within", observed)
    monkeypatch.setattr(demo, "SLOW_S", 3600.0)
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(f"http://{HOST}:{port}{awkward_path(SEED, 'slow', INDEX)}", timeout=0.5).read()
    assert left.wait(30)


def test_slow_sends_its_picture_in_the_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SLOW_S", 0.05)
    assert get_awkward(port, "slow")[2] == get(port, picture_path(SEED, INDEX))[2]


def test_html_with_the_extension_of_a_picture(port: int) -> None:
    status, headers, body = get_awkward(port, "html")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert body.startswith(b"<!doctype html>")
    assert awkward_path(SEED, "html", INDEX).endswith(".jpg")


def test_truncated_is_two_fifths_of_a_picture_and_does_not_say_so(port: int) -> None:
    whole = get(port, picture_path(SEED, INDEX))[2]
    status, headers, body = get_awkward(port, "truncated")
    assert (status, headers["Content-Length"]) == (200, str(len(body)))
    assert body == whole[: len(whole) * 2 // 5]
    with pytest.raises(OSError, match="truncated"):
        opened(body).load()


def test_empty(port: int) -> None:
    status, headers, body = get_awkward(port, "empty")
    assert (status, headers["Content-Length"], body) == (200, "0", b"")


def test_huge_is_small_in_bytes_and_valid(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body = get_awkward(port, "huge")[2]
    assert len(body) < 200_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    picture = opened(body)
    assert (picture.size, picture.mode) == ((HUGE_SIDE_PX, HUGE_SIDE_PX), "1")
    picture.verify()


def test_formats(port: int) -> None:
    found = {kind: opened(get_awkward(port, kind)[2]) for kind in ("alpha", "cmyk", "animated", "gray", "webp")}
    assert {kind: (picture.format, picture.mode) for kind, picture in found.items()} == {
        "alpha": ("PNG", "RGBA"),
        "cmyk": ("JPEG", "CMYK"),
        "animated": ("GIF", "P"),
        "gray": ("JPEG", "L"),
        "webp": ("WEBP", "RGB"),
    }
    assert getattr(found["animated"], "n_frames") == 3  # noqa: B009 - only some formats have it
    assert found["alpha"].getchannel("A").getextrema() == (0, 255)
    for kind in ("alpha", "cmyk", "animated", "webp"):
        assert mean_difference(found[kind]) < 8, kind


@pytest.mark.parametrize(("kind", "word"), [("opted_out", "noai"), ("opted_out_noimageai", "noimageai")])
def test_opted_out_is_a_good_picture_with_a_header(port: int, kind: str, word: str) -> None:
    status, headers, body = get_awkward(port, kind)
    assert (status, headers["X-Robots-Tag"]) == (200, word)
    assert body == get(port, picture_path(SEED, INDEX))[2]
    assert "X-Robots-Tag" not in get(port, picture_path(SEED, INDEX))[1]


@pytest.mark.parametrize("kind", AWKWARD_KINDS)
def test_every_kind_is_a_pure_function_of_its_path(kind: str) -> None:
    assert answer(awkward_path(SEED, kind, INDEX)) == answer(awkward_path(SEED, kind, INDEX))


def test_many_clients_at_once(port: int) -> None:
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(get(port, picture_path(SEED, i % 8))[0])) for i in range(64)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [200] * 64


def test_two_servers_share_a_port_and_a_child_process_serves_it() -> None:
    with running_server() as port, serve_demo_world(port) as address:
        assert urlsplit(address).port == port
        with running_server(port):
            assert {get(port, "/")[2] for _ in range(20)} == {IDENTITY}
    with pytest.raises(ConnectionRefusedError):
        get(port, "/")


def test_a_port_of_another_program_is_named() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^source\.demo\.port: {port} is taken .*--set source\.demo\.port={port + 1}$"
        ):
            serve_demo_world(port).__enter__()


def test_a_program_that_shares_its_port_with_everyone_is_not_taken_for_ours() -> None:
    class Other(demo.DemoWorldServer):
        def finish_request(self, request: object, client_address: object) -> None:
            assert isinstance(request, socket.socket)
            request.recv(4096)
            request.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nno")

    with Other(0) as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        with pytest.raises(ValueError, match="is taken by another program"):
            demo._answers(other.server_port)
        other.shutdown()
        thread.join()
