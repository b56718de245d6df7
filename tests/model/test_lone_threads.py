import threading
from pathlib import Path

import pytest
import torch

from model.lone_threads import lone_threads


def _num_system_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads through /proc")
def test_torch_starts_no_helpers_in_them():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.rand(1_000_000)
        torch.sqrt(values)  # the helpers of this thread are there now
        with lone_threads(3, "lone") as threads:
            assert torch.get_num_threads() == 2
            num_threads = _num_system_threads()
            barrier = threading.Barrier(3)

            def compute(_: int) -> int:
                torch.sqrt(values)
                barrier.wait()  # each of the three takes one
                return torch.get_num_threads()

            assert list(threads.map(compute, range(3))) == [1, 1, 1]
            assert _num_system_threads() == num_threads
    finally:
        torch.set_num_threads(before)
