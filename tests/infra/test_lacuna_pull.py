"""The client that others copy: it brings what `pull` brings, goes on where it was killed, and believes nobody."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import lacuna_pull as client
from infra.bundles import MANIFEST_NAME, commit_bundle, delete_bundle
from infra.channels import ChannelPointer, move_channel, pointer_to, pull
from infra.presigning import LONGEST_S, presign
from infra.storage import ObjectStore, open_store
from infra.storage_folder import FolderStore
from infra.storage_s3 import S3Store

SOURCE = Path(client.__file__)
LARGE = random.Random(0).randbytes(18 << 20)


def always(_: ChannelPointer | None) -> bool:
    return True


def publish(root: str, tmp_path: Path, step: int, **more: bytes) -> str:
    folder = tmp_path / f"made-{step}"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "weights").write_text(f"weights of {step}")
    (folder / "empty").touch()
    for name, data in more.items():
        (folder / name).write_bytes(data)
    store = open_store(root)
    prefix = f"exports/demo/step-{step:08d}"
    commit_bundle(store, prefix, folder, kind="export", run_id="demo", step=step)
    move_channel(store, "latest", pointer_to(store, "latest", prefix), always)
    return prefix


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments: str, cwd: Path, flags: tuple[str, ...] = ("-I",)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "lacuna_pull.py", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Another project: a folder with the one file."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(SOURCE, folder)
    return folder


def test_copied_alone_it_works_without_any_package(tmp_path: Path, elsewhere: Path):
    root = str(tmp_path / "store")
    publish(root, tmp_path, 100)
    # Without site-packages: not even boto3, which a folder does not need.
    done = run(root, "latest", "--to", "model", cwd=elsewhere, flags=("-I", "-S"))
    assert (done.returncode, done.stdout) == (0, f"{elsewhere / 'model'}\n"), done.stderr
    found = contents(elsewhere / "model")
    assert found.pop(MANIFEST_NAME) == open_store(root).read(f"exports/demo/step-00000100/{MANIFEST_NAME}")
    assert found == contents(tmp_path / "made-100")
    again = run(root, "latest", "--to", "model", cwd=elsewhere, flags=("-I", "-S"))
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert "unchanged" in again.stderr
    wrong = run(root, "stable", "--to", "model", cwd=elsewhere)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: channel: 'stable' points to nothing")
    assert {path.name for path in elsewhere.iterdir()} == {"lacuna_pull.py", "model"}


def test_it_brings_what_pull_brings(any_root: str, tmp_path: Path):
    publish(any_root, tmp_path, 100, large=LARGE[: 9 << 20])
    seen: list[tuple[int, int]] = []
    to = client.lacuna_pull(any_root, "latest", tmp_path / "to", on_progress=lambda *at: seen.append(at))
    pull(open_store(any_root), "latest", tmp_path / "other")
    assert contents(to) == contents(tmp_path / "other")
    total = (9 << 20) + len("weights of 100")
    assert seen[-1] == (total, total)
    assert client.lacuna_pull(f"{any_root}/", "exports/demo/step-00000100", tmp_path / "to") == to
    publish(any_root, tmp_path, 200)
    client.lacuna_pull(any_root, "latest", to)
    assert contents(to).items() >= contents(tmp_path / "made-200").items()
    assert len(contents(to)) == 3
    assert not list(tmp_path.glob(".to*"))


class _Watched:
    """Remembers from where on which objects were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[tuple[str, int, str | None]] = []
        for kind in (client._S3, client._Folder):
            monkeypatch.setattr(kind, "open", self._watch(kind.open))
        before = S3Store.read_range

        def read_range(store: S3Store, key: str, start: int, num_bytes: int, etag: str | None = None) -> bytes:
            self.opened.append((key, start, etag))
            return before(store, key, start, num_bytes, etag)

        monkeypatch.setattr(S3Store, "read_range", read_range)

    def _watch(self, before: Callable[..., Any]) -> Callable[..., Any]:
        def opened(source: object, key: str, start: int, etag: str | None) -> Any:
            self.opened.append((key, start, etag))
            return before(source, key, start, etag)

        return opened


def test_if_nothing_changed_only_the_pointer_is_read(any_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish(any_root, tmp_path, 100)
    to = client.lacuna_pull(any_root, "latest", tmp_path / "to")
    watched = _Watched(monkeypatch)
    client.lacuna_pull(any_root, "latest", to)
    assert [key for key, _, _ in watched.opened] == ["channels/latest.json"]
    (to / "deep" / "er" / "weights").write_text("WEIGHTS OF 100")
    client.lacuna_pull(any_root, "latest", to)
    assert (to / "deep" / "er" / "weights").read_text() == "WEIGHTS OF 100"  # the sizes are as they were
    client.lacuna_pull(any_root, "latest", to, if_changed=False)
    assert (to / "deep" / "er" / "weights").read_text() == "weights of 100"


_KILLED = {
    "client": """
import os, sys
from infra.lacuna_pull import lacuna_pull
lacuna_pull(sys.argv[1], "latest", "to", on_progress=lambda done, total: done > total // 2 and os._exit(9))
""",
    "pull": """
import os, sys
from pathlib import Path
from infra.channels import pull
from infra.storage import open_store
pull(open_store(sys.argv[1]), "latest", Path("to"), on_progress=lambda done, total: done > total // 2 and os._exit(9))
""",
}


@pytest.mark.parametrize("second", ["client", "pull"])
@pytest.mark.parametrize("first", ["client", "pull"])
def test_a_killed_pull_goes_on_from_its_bytes(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
):
    prefix = publish(s3_root, tmp_path, 100, large=LARGE)
    killed = subprocess.run([sys.executable, "-c", _KILLED[first], s3_root], cwd=tmp_path, timeout=120)
    assert killed.returncode == 9
    assert not (tmp_path / "to").exists()
    watched = _Watched(monkeypatch)
    if second == "client":
        client.lacuna_pull(s3_root, "latest", tmp_path / "to")
    else:
        pull(open_store(s3_root), "latest", tmp_path / "to")
    starts = [(start, etag) for key, start, etag in watched.opened if key == f"{prefix}/large"]
    assert starts[0][0] > len(LARGE) // 3
    assert starts[0][1] == open_store(s3_root).head(f"{prefix}/large").etag
    assert contents(tmp_path / "to").items() >= contents(tmp_path / "made-100").items()
    assert len(contents(tmp_path / "to")) == 4
    assert not list(tmp_path.glob(".to*"))


@pytest.mark.parametrize("second", ["client", "pull"])
@pytest.mark.parametrize("damage", ["part", "etag"])
def test_what_was_left_is_not_believed(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, damage: str
):
    prefix = publish(s3_root, tmp_path, 100, large=LARGE)
    subprocess.run([sys.executable, "-c", _KILLED["client"], s3_root], cwd=tmp_path, timeout=120)
    (part,) = (path for path in tmp_path.glob(".to*/.lacuna-parts/*") if path.suffix != ".etag")
    if damage == "part":
        with open(part, "r+b") as file:
            file.write(b"damaged")
    else:  # it is a part of another object of this name
        part.with_suffix(".etag").write_text('"0123456789abcdef0123456789abcdef"')
    watched = _Watched(monkeypatch)
    if second == "client":
        client.lacuna_pull(s3_root, "latest", tmp_path / "to")
    else:
        pull(open_store(s3_root), "latest", tmp_path / "to")
    assert contents(tmp_path / "to")["large"] == LARGE
    assert 0 in [start for key, start, _ in watched.opened if key == f"{prefix}/large"]


def test_a_bundle_deleted_under_a_pull_makes_it_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = str(tmp_path / "store")
    store = open_store(root)
    first = publish(root, tmp_path, 100)
    before = client._Folder.open

    def opened(source: client._Folder, key: str, start: int, etag: str | None) -> Any:
        if key == f"{first}/empty" and store.exists(key):
            publish(root, tmp_path, 200)
            delete_bundle(store, first)
        return before(source, key, start, etag)

    monkeypatch.setattr(client._Folder, "open", opened)
    to = client.lacuna_pull(root, "latest", tmp_path / "to")
    assert (to / "deep" / "er" / "weights").read_text() == "weights of 200"
    assert not list(tmp_path.glob(".to*"))
    with pytest.raises(ValueError, match="does not exist, or was deleted"):
        client.lacuna_pull(root, first, tmp_path / "new")


def test_it_believes_neither_a_changed_manifest_nor_a_changed_file(tmp_path: Path):
    root = str(tmp_path / "store")
    store = open_store(root)
    prefix = publish(root, tmp_path, 100)
    store.put(f"{prefix}/deep/er/weights", b"WEIGHTS OF 100")
    with pytest.raises(ValueError, match=r"deep/er/weights: 14 bytes with sha256"):
        client.lacuna_pull(root, "latest", tmp_path / "to")
    key = f"{prefix}/{MANIFEST_NAME}"
    store.put(key, store.read(key).replace(b'"step": 100', b'"step": 101'))
    with pytest.raises(ValueError, match="tampered"):
        client.lacuna_pull(root, "latest", tmp_path / "to")
    assert not list(tmp_path.glob("*to"))


@pytest.mark.parametrize("name", ["../out", "/out", "a//b", "", "a/../../out", "a\\b", "c:/out", ".lacuna-parts/x"])
def test_a_manifest_cannot_name_files_outside(tmp_path: Path, name: str):
    store = open_store(str(tmp_path / "store"))
    files = [{"name": name, "num_bytes": 1, "sha256": "0" * 64}]
    store.put(f"exports/a/b/{MANIFEST_NAME}", json.dumps({"format_version": 1, "files": files}).encode())
    with pytest.raises(ValueError, match="no name of an object"):
        client.lacuna_pull(store.uri, "exports/a/b", tmp_path / "to")


@pytest.mark.parametrize("made", ["file", "strangers", "mixed", "link"])
def test_what_is_no_earlier_pull_is_not_replaced(tmp_path: Path, made: str):
    root, to = str(tmp_path / "store"), tmp_path / "to"
    publish(root, tmp_path, 100)
    if made == "file":
        to.touch()
    elif made == "link":
        to.symlink_to(tmp_path / "made-100")
    else:
        if made == "mixed":
            client.lacuna_pull(root, "latest", to)
        to.mkdir(exist_ok=True)
        (to / "thesis.txt").write_text("mine")
    publish(root, tmp_path, 200)
    with pytest.raises(ValueError, match=r"^to: .*(choose another folder)"):
        client.lacuna_pull(root, "latest", to)
    assert made in ("file", "link") or (to / "thesis.txt").read_text() == "mine"


def test_newer_formats_are_refused(tmp_path: Path):
    store = FolderStore(tmp_path / "store")
    store.put("channels/latest.json", b'{"format_version": 2}')
    with pytest.raises(ValueError, match="is of format 2, this program reads 1"):
        client.lacuna_pull(store.uri, "latest", tmp_path / "to")


# Presigned


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the credentials away."""

    def forget() -> None:
        for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CONFIG_FILE"]:
            monkeypatch.delenv(name)

    return forget


def test_outsiders_need_no_account_and_no_package(
    s3_root: str, tmp_path: Path, elsewhere: Path, no_account: Callable[[], None]
):
    publish(s3_root, tmp_path, 100, large=LARGE[: 3 << 20])
    told = presign(open_store(s3_root), "latest", 3600)
    assert {(file.name, file.num_bytes) for file in told.files} == {
        ("deep/er/weights", 14),
        ("empty", 0),
        ("large", 3 << 20),
    }
    assert all("X-Amz-Expires=3600" in file.url for file in (*told.files, told.manifest))
    (elsewhere / "stable.json").write_text(told.model_dump_json(indent=1))
    no_account()
    done = run("stable.json", "--to", "model", cwd=elsewhere, flags=("-I", "-S"))
    assert (done.returncode, done.stdout) == (0, f"{elsewhere / 'model'}\n"), done.stderr
    assert contents(elsewhere / "model").items() >= contents(tmp_path / "made-100").items()
    assert "unchanged" in run("stable.json", "--to", "model", cwd=elsewhere).stderr


def test_an_address_that_is_changed_or_deleted_is_one_line(s3_root: str, tmp_path: Path):
    prefix = publish(s3_root, tmp_path, 100)
    store = open_store(s3_root)
    told = presign(store, prefix, 60).model_dump_json()
    path = tmp_path / "presigned.json"
    path.write_text(told.replace("X-Amz-Expires=60&", "X-Amz-Expires=61&"))
    with pytest.raises(ValueError, match=r"HTTP 403; the address may have expired"):
        client.lacuna_pull(str(path), None, tmp_path / "to")
    path.write_text(told)
    store.delete(f"{prefix}/empty")
    with pytest.raises(ValueError, match="does not exist, or was deleted"):
        client.lacuna_pull(str(path), None, tmp_path / "to")
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file that `lacuna presign` wrote"):
        client.lacuna_pull(str(path), None, tmp_path / "to")


def test_what_cannot_be_presigned_is_one_line(s3_root: str, tmp_path: Path):
    folder: ObjectStore = open_store(str(tmp_path / "store"))
    with pytest.raises(ValueError, match="is a folder, which has no addresses to sign"):
        presign(folder, "latest", 60)
    store = open_store(s3_root)
    for seconds in (0, LONGEST_S + 1):
        with pytest.raises(ValueError, match="out of range"):
            presign(store, "latest", seconds)
    with pytest.raises(ValueError, match="'latest' points to nothing"):
        presign(store, "latest", 60)
