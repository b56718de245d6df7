"""Threads in each of which torch computes alone: several of them side by side are the parallelism."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def lone_threads(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Starts threads in which torch does not spread a call over further ones; elsewhere nothing changes.

    torch's number is the one that threads yet to compute begin with, OpenMP's is each thread's own; a thread takes
    torch's over when it first asks for it. So each of these asks while the number is 1. One that had missed it would
    start helpers of its own at every call; with more of them than cores OpenMP lets all helpers sleep between calls,
    and every operation of the main thread takes half as long again.

    Args:
        num_threads: How many.
        name: What they are called, before a number.
    """
    others = torch.get_num_threads()
    all_there = threading.Barrier(num_threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()
        all_there.wait()

    threads = ThreadPoolExecutor(num_threads, name, begin)
    for _ in range(num_threads):
        threads.submit(int)  # a thread is started when there is something to do
    all_there.wait()
    torch.set_num_threads(others)
    return threads
