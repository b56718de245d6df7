"""One upload at a time, while other work goes on; it does not fail silently."""

import threading

import pytest

from infra.errors import ContractError, TransientError
from training.checkpoint_upload import Uploader


def test_work_goes_on_while_it_uploads():
    uploader = Uploader()
    may_end = threading.Event()

    def work() -> None:
        may_end.wait(60)

    uploader.start("one", work)
    assert uploader.take_done() == []
    with pytest.raises(AssertionError, match="one at a time"):
        uploader.start("two", lambda: None)
    may_end.set()
    uploader.wait()
    assert uploader.take_done() == ["one"]
    assert uploader.take_done() == []
    uploader.start("two", lambda: None)
    uploader.wait()
    assert uploader.take_done() == ["two"]


@pytest.mark.parametrize(("num_failures", "ends_well"), [(0, True), (2, True), (3, False)])
def test_it_is_tried_again_and_then_raised(num_failures: int, ends_well: bool):
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) <= num_failures:
            raise TransientError(f"failure {len(calls)}")

    uploader = Uploader(delays_s=(0, 0))
    uploader.start("one", work)
    if ends_well:
        uploader.wait()
        assert uploader.take_done() == ["one"]
    else:
        with pytest.raises(TransientError, match="failure 3"):
            uploader.wait()
        assert uploader.take_done() == []
        uploader.wait()  # told once
    assert len(calls) == min(num_failures + 1, 3)


def test_what_no_retry_can_help_is_raised_at_once():
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise ContractError("no")

    uploader = Uploader(delays_s=(60,))
    uploader.start("one", work)
    with pytest.raises(ContractError, match="no"):
        uploader.wait()
    assert calls == [1]


def test_one_may_wait_for_a_while_only():
    uploader = Uploader()
    may_end = threading.Event()

    def work() -> None:
        may_end.wait(60)

    uploader.start("one", work)
    told: list[str] = []
    assert not uploader.wait(told.append, at_most_s=0.01)
    assert told == ["one"]
    may_end.set()
    assert uploader.wait(at_most_s=60)
    assert uploader.wait(at_most_s=0)
    assert uploader.take_done() == ["one"]
