"""The watchdog, in a process that it may end."""

import os
import subprocess
import sys
import time
from pathlib import Path

from infra.errors import EXIT_OUTSIDE_WORLD
from training.watchdog import Watchdog

HANGS = """
import threading
from training.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

with Watchdog(0.2):
    waits_for_ever()
"""


def test_a_hung_process_ends_and_says_where_it_stands():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", HANGS], env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == EXIT_OUTSIDE_WORLD
    assert "in waits_for_ever" in ended.stderr
    assert '"type": "TransientError"' in ended.stdout
    assert "train.stall_timeout_s" in ended.stdout


def test_progress_and_pauses_keep_it_quiet():
    watchdog = Watchdog(0.5)
    for _ in range(2):
        with watchdog:
            for _ in range(5):
                time.sleep(0.2)
                watchdog.note()
            with watchdog.paused():
                time.sleep(1)
