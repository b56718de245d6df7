import subprocess
import sys

import numpy as np

from model.randomness import stream


def test_streams_differ_by_every_part_of_their_name():
    names = [("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a",), ("a", 1, 0), ("a,", 1), ("a", 12), ("a1", 2)]
    draws = [stream(*name).integers(0, 2**63) for name in names]
    assert len(set(draws)) == len(names)


def test_a_stream_is_the_same_in_another_process():
    code = "from model.randomness import stream; print(stream('mask', 7, 'ü', 0).integers(0, 2**63))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(other) == stream("mask", 7, "ü", 0).integers(0, 2**63)


def test_neighboring_streams_are_uncorrelated():
    draws = np.stack([stream("noise", 0, i).standard_normal(2000) for i in range(20)])
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 0.12
