"""robots.txt, where ``download.robots_txt`` says so: each origin's is asked for once, with the same client.

| robots.txt | means |
| --- | --- |
| there | its rules for our name, or for ``*``; its Crawl-delay and Request-rate are kept |
| 4xx | everything is allowed |
| 5xx, not to be reached, too many redirects | nothing is allowed, for this run |

Only the first 500 kB count.

Source: RFC 9309; Crawl-delay and Request-rate are customs.
"""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future

from protego import Protego

from preprocessing.download.addresses import Target, Verdict, parse_url
from preprocessing.download.politeness import HostTurns

MAX_ROBOTS_BYTES = 500 * 1024
_MAX_ORIGINS = 16_384

Ask = Callable[[Target], tuple[int, bytes] | None]


class RobotsRules:
    """The rules of all origins that were asked.

    Args:
        robot: Our name.
        ask: Gets a robots.txt: status and body; None where it cannot be reached.
        turns: Told of the pauses that are asked for.
    """

    def __init__(self, robot: str, ask: Ask, turns: HostTurns) -> None:
        self._robot = robot
        self._ask = ask
        self._turns = turns
        self._rules: collections.OrderedDict[str, Future[Protego | None]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def refuses(self, target: Target) -> str | None:
        """Why a URL may not be asked for; None where it may."""
        rules = self._of(target)
        if rules is None:
            return f"{target.origin}/robots.txt cannot be had, so nothing there may be asked for"
        return None if rules.can_fetch(target.url, self._robot) else f"{target.origin}/robots.txt disallows it"

    def _of(self, target: Target) -> Protego | None:
        asked: Future[Protego | None] = Future()
        with self._lock:
            found = self._rules.setdefault(target.origin, asked)
            if len(self._rules) > _MAX_ORIGINS:
                self._rules.popitem(last=False)
        if found is not asked:
            return found.result()  # whoever asks has a deadline
        try:
            rules = self._read(target)
        except BaseException as error:
            asked.set_exception(error)
            raise
        asked.set_result(rules)
        return rules

    def _read(self, target: Target) -> Protego | None:
        address: Target | Verdict = parse_url(f"{target.origin}/robots.txt")
        said = self._ask(address) if isinstance(address, Target) else None
        if said is None:
            return None
        rules = Protego.parse(said[1][:MAX_ROBOTS_BYTES].decode("utf-8", "replace"))
        delay_s = rules.crawl_delay(self._robot) or 0.0
        rate = rules.request_rate(self._robot)
        if rate is not None and rate.requests:
            delay_s = max(delay_s, rate.seconds / rate.requests)
        if delay_s:
            self._turns.slow_down(target.host, delay_s)
        return rules
