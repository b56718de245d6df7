"""The decoder processes: what they may do, and what becomes of a picture whose decoder is killed."""

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from image_corpus import encoded, many_scans, png_bomb, small, textured

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.decoder import SHARED_BYTES, SLOT_BYTES
from preprocessing.download.decoding import Decoders, Limits
from preprocessing.download.images import NormalizedImage, normalize_image

CONFIG = DownloadConfig()
SLOW = many_scans(4_000, 4_000, 12)  # most of a second


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: tuple[int, ...], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    """Of all its threads: a child belongs to the thread that forked it, and at that one's end to any other."""
    pids = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            pids.extend(int(word) for word in (task / "children").read_text().split())
    return pids


def test_many_threads_get_their_own_pictures() -> None:
    pictures = [encoded(textured(60 + number, 50, number), "PNG") for number in range(60)]
    with Decoders(CONFIG, 2) as decoders:
        before = decoders.pids
        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(decoders.normalize, pictures))
        assert decoders.pids == before
        assert decoders.normalize(b"<html>")[0] is Reason.NOT_AN_IMAGE  # pyright: ignore[reportIndexIssue]  # a verdict
    assert results == [normalize_image(data, CONFIG) for data in pictures]
    wait_until_gone(before)
    with pytest.raises(RuntimeError, match="closed"):
        decoders.normalize(b"")


def test_files_together_are_as_files_apart() -> None:
    large = encoded(Image.frombytes("RGB", (500, 500), random.Random(0).randbytes(750_000)), "PNG")
    assert len(large) > SLOT_BYTES
    files = [small("JPEG"), large, b"<html>", *[encoded(textured(60 + n, 50, n), "PNG") for n in range(20)], b"", large]
    with Decoders(CONFIG, 1) as decoders:
        before = decoders.pids
        together = decoders.normalize_all(files)
        assert decoders.pids == before
        assert together == [decoders.normalize(data) for data in files]
        assert decoders.normalize_all([]) == []


def test_a_decoder_knows_no_secret_and_can_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hush@proxy")
    with Decoders(CONFIG, 1) as decoders:
        assert isinstance(decoders.normalize(small("PNG")), NormalizedImage)  # all is set up before the first
        (pid,) = decoders.pids
        assert b"hush" not in Path(f"/proc/{pid}/environ").read_bytes()
        opened = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        assert opened - {os.devnull} == {link for link in opened if link.startswith("socket:")}
        assert len(opened) == 2
        limits = Path(f"/proc/{pid}/limits").read_text()
        rows = {line[:25].strip(): line[25:].split() for line in limits.splitlines()[1:]}
        assert rows["Max open files"][:2] == ["4", "4"]
        assert rows["Max core file size"][:2] == ["0", "0"]
        assert rows["Max file size"][:2] == ["0", "0"]
        assert rows["Max processes"][:2] == ["0", "0"]
        most = int(rows["Max address space"][1])
        assert Limits().memory_bytes < most < Limits().memory_bytes + 1_000_000_000
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps
        assert "pyarrow" not in maps


def test_limits_become_reasons_and_the_next_picture_is_fine() -> None:
    with Decoders(CONFIG, 1, limits=Limits(memory_bytes=60_000_000)) as decoders:
        for data in (png_bomb(5_000, 5_000, 8, 2), png_bomb(4_000, 4_000, 8, 6)):
            result = decoders.normalize(data)
            assert isinstance(result, tuple)
            assert result[0] is Reason.DECODE_OUT_OF_MEMORY
            assert isinstance(decoders.normalize(small("WEBP")), NormalizedImage)
    with Decoders(CONFIG, 1, limits=Limits(cpu_s=0.2)) as decoders:
        (before,) = decoders.pids
        assert decoders.normalize(many_scans(6_000, 6_000, 50)) == (
            Reason.DECODE_TIMED_OUT,
            "took over 0.2 s of processor time",
        )
        wait_until_gone((before,))
        assert isinstance(decoders.normalize(small("GIF")), NormalizedImage)
    with Decoders(CONFIG, 1, limits=Limits(wall_s=0.1)) as decoders:
        start = time.monotonic()
        assert decoders.normalize(SLOW) == (Reason.DECODE_TIMED_OUT, "took over 0.1 s")
        assert time.monotonic() - start < 10
        assert isinstance(decoders.normalize(small("PNG")), NormalizedImage)


def test_processor_time_is_counted_for_each_picture() -> None:
    data = encoded(textured(700, 700), "PNG")
    with Decoders(CONFIG, 1, limits=Limits(cpu_s=0.5)) as decoders:
        (pid,) = decoders.pids
        start = ticks_of(pid)
        while ticks_of(pid) - start < 2.5 * os.sysconf("SC_CLK_TCK"):
            assert isinstance(decoders.normalize(data), NormalizedImage)
        assert decoders.pids == (pid,)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_picture_whose_decoder_dies_is_tried_once_more(number: signal.Signals) -> None:
    """The first death is forgiven, the second is the picture's."""
    for deaths in (1, 2):
        with Decoders(CONFIG, 1, limits=Limits(wall_s=120)) as decoders, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(decoders.normalize, SLOW)
            seen: set[int] = set()
            while len(seen) < deaths and not answer.done():
                for pid in set(decoders.pids) - seen:
                    wait_until_busy(pid)
                    os.kill(pid, number)
                    seen.add(pid)
            result = answer.result(timeout=30)
            if deaths == 1:
                assert isinstance(result, NormalizedImage)
            else:
                assert result == (Reason.DECODER_DIED, f"its decoder ended with {number.name}")
            assert isinstance(decoders.normalize(small("PNG")), NormalizedImage)


def test_one_of_several_does_not_take_the_others_with_it() -> None:
    """The decoder dies of the third of seven whenever it comes to it."""
    files = [small("PNG")] * 2 + [SLOW] + [small("PNG")] * 4
    with Decoders(CONFIG, 1, limits=Limits(wall_s=120)) as decoders, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(decoders.normalize_all, files)
        seen: set[int] = set()
        while len(seen) < 3 and not answer.done():  # once among others, and the two tries that each picture has
            for pid in set(decoders.pids) - seen:
                wait_until_busy(pid)
                os.kill(pid, signal.SIGKILL)
                seen.add(pid)
        results = answer.result(timeout=60)
    assert [isinstance(result, NormalizedImage) for result in results] == [True, True, False, True, True, True, True]
    assert results[2] == (Reason.DECODER_DIED, "its decoder ended with SIGKILL")


def ticks_of(pid: int) -> int:
    """Processor time so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_until_busy(pid: int) -> None:
    """Until it has computed for a little: then it holds the picture."""
    first = ticks_of(pid)
    deadline = time.monotonic() + 60
    while ticks_of(pid) < first + 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("num_pictures", [200, pytest.param(5_000, marks=pytest.mark.soak)])
def test_random_kills_lose_no_picture(num_pictures: int) -> None:
    """A random decoder is killed at random moments, thirty times in two hundred pictures, one or several at a time."""
    pictures = [encoded(textured(300, 280, seed), "PNG") for seed in range(5)]
    expected = [normalize_image(data, CONFIG) for data in pictures]
    source = random.Random(3)
    num_done = num_kills = 0
    lock = threading.Lock()

    def some(numbers: range) -> list[NormalizedImage | tuple[Reason, str]]:
        nonlocal num_done, num_kills
        for _ in numbers:
            pids = decoders.pids
            if pids and source.random() < 0.15:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(source.choice(pids), signal.SIGKILL)
                    num_kills += 1
        found = decoders.normalize_all([pictures[number % 5] for number in numbers])
        with lock:
            num_done += len(found)
        return found

    starts = [0]
    while starts[-1] < num_pictures:
        starts.append(min(num_pictures, starts[-1] + source.choice((1, 1, 1, 5, 12))))
    together = [range(start, end) for start, end in itertools.pairwise(starts)]
    with Decoders(CONFIG, 2, limits=Limits(wall_s=60)) as decoders, ThreadPoolExecutor(8) as pool:
        results = [result for found in pool.map(some, together) for result in found]
    assert num_kills >= num_pictures // 20
    assert num_done == len(results) == num_pictures
    for number, result in enumerate(results):
        if isinstance(result, NormalizedImage):
            assert result == expected[number % 5]
        else:
            assert result[0] is Reason.DECODER_DIED
    assert sum(not isinstance(result, NormalizedImage) for result in results) <= num_kills // 2


def test_a_dead_nursery_is_replaced() -> None:
    with Decoders(CONFIG, 2) as decoders:
        before = decoders.pids
        (nursery,) = [pid for pid in children_of(os.getpid()) if set(children_of(pid)) & set(before)]
        others = set(children_of(os.getpid())) - {nursery}  # other tests' servers
        os.kill(nursery, signal.SIGKILL)
        wait_until_gone(before)  # decoders die with it
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(decoders.normalize, [small("PNG")] * 8))
        assert all(isinstance(result, NormalizedImage) for result in results)
        assert len(set(children_of(os.getpid())) - others) == 1


PARENT = """
import sys, threading
from preprocessing.contracts.config import DownloadConfig
from preprocessing.download.decoding import Decoders
data = open(sys.argv[1], "rb").read()
with Decoders(DownloadConfig(), 2) as decoders:
    for _ in range(2):
        threading.Thread(target=decoders.normalize, args=(data,), daemon=True).start()
    print(*decoders.pids, flush=True)
    threading.Event().wait()
"""


def test_nothing_survives_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "slow.jpg").write_bytes(SLOW)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "slow.jpg")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        decoders = tuple(int(word) for word in parent.stdout.readline().split())
        assert len(decoders) == 2
        nurseries = tuple(children_of(parent.pid))
        assert len(nurseries) == 1
        wait_until_busy(decoders[0])
        parent.kill()
        wait_until_gone((*decoders, *nurseries), seconds=5)


def _in_a_daemon(data: bytes, answers: "multiprocessing.Queue[int]") -> None:
    with Decoders(CONFIG, 1) as decoders:
        result = decoders.normalize(data)
        answers.put(result.width if isinstance(result, NormalizedImage) else -1)


def test_a_daemonic_worker_may_have_decoders() -> None:
    """As img2dataset's workers are: spawned, daemonic, forbidden to have multiprocessing children."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_in_a_daemon, args=(small("JPEG"), answers), daemon=True)
    worker.start()
    assert answers.get(timeout=60) == 64
    worker.join(timeout=20)
    assert worker.exitcode == 0


def test_neither_the_parent_nor_its_decoders_grow() -> None:
    data = encoded(textured(300, 280), "PNG")

    def rss(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with Decoders(CONFIG, 1) as decoders:
        for _ in range(20):
            decoders.normalize(data)
        (pid,) = decoders.pids
        before = rss(os.getpid()), rss(pid)
        for _ in range(200):
            decoders.normalize(data)
        assert decoders.pids == (pid,)
        assert rss(os.getpid()) - before[0] < 10_000_000
        assert rss(pid) - before[1] < 10_000_000
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            os.kill(decoders.pids[0], signal.SIGKILL)
            decoders.normalize(data)
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_huge_file_of_nothing_costs_no_decoder() -> None:
    with Decoders(CONFIG, 1) as decoders:
        before = decoders.pids
        result = decoders.normalize(b"\xff\xd8\xff" + bytes(60_000_000))
        assert isinstance(result, tuple)
        assert result[0] is Reason.IMAGE_TRUNCATED
        assert decoders.pids == before


def test_the_answer_is_as_from_the_function_itself() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (600, 900), (1, 200, 30)).save(buffer, "JPEG")
    with Decoders(CONFIG, 1) as decoders:
        assert decoders.normalize(buffer.getvalue()) == normalize_image(buffer.getvalue(), CONFIG)


def test_what_does_not_fit_into_the_shared_memory_comes_through() -> None:
    config = DownloadConfig(image_size_px=2000, encode_quality=100)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (1300, 1300), random.Random(0).randbytes(3 * 1300 * 1300)).save(buffer, "PNG")
    data = buffer.getvalue()
    with Decoders(config, 1) as decoders:
        stored = decoders.normalize(data)
        assert isinstance(stored, NormalizedImage)
        assert min(len(data), len(stored.image)) > SHARED_BYTES
        assert stored == normalize_image(data, config)
        assert decoders.normalize(small("JPEG")) == normalize_image(small("JPEG"), config)
