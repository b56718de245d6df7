"""The client that asks strangers for pictures: slow in nothing, trusting in nothing.

For every URL, and for every redirect again: its form is judged, its host resolved (once in a run), every address
judged, a connection made to a judged address and to nothing else, the certificate held against the name, opt-outs
respected. An answer has a deadline, a least rate, and limits on headers, body and redirects; all answers in flight
share a budget of memory. One TLS context; connections are kept; proxies, cookies, credentials and caches there are
none.

What comes back is the bytes, or a drop reason. Whether a body without a declared length is whole, nobody can tell from
HTTP: the picture's own end marker decides (`containers`).
"""

import contextlib
import ipaddress
import logging
import random
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urljoin

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.addresses import Address, Target, Verdict, parse_url, refuse_addresses
from preprocessing.download.connections import (
    Connection,
    ConnectionPool,
    Deadline,
    Method,
    OverLimitError,
    connect,
    tls_context,
)
from preprocessing.download.opt_out import OptOutMemory, opt_out
from preprocessing.download.politeness import ByteBudget, HostTurns, NotNowError
from preprocessing.download.resolver import Resolver
from preprocessing.download.responses import BadResponseError, CutShortError, Response
from preprocessing.download.robots import RobotsRules

LOGGER = logging.getLogger(__name__)

MAX_DETAIL_CHARS = 200
DEFAULT_TOKEN = "Lacuna"  # noqa: S105 - a robot's name
_PIECE_BYTES = 1 << 18
_MAX_DISCARDED_BYTES = 1 << 14  # a redirect's or an error's page is read to keep the connection, up to here
_MAX_ADDRESSES = 3  # of one host that are tried
_BACK_OFF_S = 0.5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MISDIRECTED = 421  # to be asked again on another connection
_NOT_NOW = frozenset({408, _MISDIRECTED, 423, 425})
"""Refusals of this moment, not of the picture. Source: RFC 9110 §15.5.9 and §15.5.20, RFC 4918 §11.3, RFC 8470 §5.2."""
_CODINGS = frozenset({"gzip", "x-gzip", "deflate", "compress", "br", "zstd"})


@dataclass(frozen=True)
class Answer:
    """What came.

    Attributes:
        data: The body, whole as far as HTTP tells.
        url: Where it came from, after redirects.
        status: 2xx.
    """

    data: bytes
    url: str
    status: int


class _FailedError(Exception):
    """A request came to nothing.

    Attributes:
        verdict: Why.
        is_passing: Whether another attempt may do better.
    """

    def __init__(self, reason: Reason, detail: str, *, is_passing: bool = False) -> None:
        super().__init__(detail)
        self.verdict: Verdict = reason, detail[:MAX_DETAIL_CHARS]
        self.is_passing = is_passing


class HttpClient:
    """A client for many threads.

    Args:
        config: Its limits and manners.
        resolver: Default: the system's, cached.
        opted_out: What said no already.
        method: ``HEAD``: what comes are the headers, and an answer without data.
    """

    def __init__(
        self,
        config: DownloadConfig,
        *,
        resolver: Resolver | None = None,
        opted_out: OptOutMemory | None = None,
        method: Method = "GET",
    ) -> None:
        self._config = config
        self._method: Method = method
        self._robot = (config.user_agent_token or DEFAULT_TOKEN).lower()
        headers = {"User-Agent": user_agent(config), "Accept": "image/*", "Accept-Encoding": "identity"}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("ascii")
        self._allowed = tuple(ipaddress.ip_network(network) for network in config.allow_networks)
        self.resolver = resolver or Resolver(config.dns_ttl_s)
        self.opted_out = OptOutMemory() if opted_out is None else opted_out
        self.turns = HostTurns(config)
        self._pool = ConnectionPool(max(16, 2 * config.num_threads))
        self._memory = ByteBudget(config.max_bodies_bytes)
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._robots = None
        if config.robots_txt:
            self._robots = RobotsRules(self._robot, self._ask_for_robots, self.turns)

    def close(self) -> None:
        """Closes what is kept."""
        self._pool.close()
        self.resolver.close()

    def __enter__(self) -> "HttpClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, url: str) -> "Held":
        """Asks for a URL.

        Args:
            url: As it stands in the metadata.

        Returns:
            A context manager of the answer, or of why there is none; what came counts against the budget of memory
            until its block is left, in whatever thread.
        """
        held = Held(self._memory)
        try:
            held.said = self._get(url, held)
        except BaseException:
            held.give_back()
            raise
        return held

    def _get(self, url: str, held: "Held") -> Answer | Verdict:
        target = parse_url(url)
        if not isinstance(target, Target):
            return target
        if target.url in self.opted_out:
            return Reason.OPTED_OUT, "said no earlier in this run"
        deadline = Deadline(self._config.deadline_s)
        for attempt in range(self._config.retries + 1):
            held.give_back()
            try:
                return self._follow(target, deadline, held)
            except _FailedError as failed:
                if not failed.is_passing or attempt == self._config.retries or deadline.is_over():
                    return failed.verdict
            pause_s = _BACK_OFF_S * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            deadline.extend(pause_s)
            time.sleep(pause_s)
        raise AssertionError("unreachable")

    def _follow(self, target: Target, deadline: Deadline, held: "Held") -> Answer:
        """Asks, and follows redirects; each is judged as if it were the first URL.

        Raises:
            _FailedError: Nothing came of it.
        """
        first = target
        for _ in range(self._config.max_redirects + 1):
            if self._robots is not None:
                self._mind_robots(target, deadline)
            answer = self._ask(target, deadline, held, (first.url, target.url))
            if isinstance(answer, Answer):
                return answer
            if target.scheme == "https" and answer.scheme == "http" and not self._config.allow_downgrade:
                raise _FailedError(Reason.URL_REFUSED, "redirect from https to http (download.allow_downgrade)")
            target = answer
            if target.url in self.opted_out:
                raise _FailedError(Reason.OPTED_OUT, "redirect to what said no earlier in this run")
        raise _FailedError(Reason.TOO_MANY_REDIRECTS, f"over {self._config.max_redirects} redirects")

    def _mind_robots(self, target: Target, deadline: Deadline) -> None:
        assert self._robots is not None
        self._addresses(target, deadline)  # a host that must not be asked is not asked for its rules either
        started = time.monotonic()
        refused = self._robots.refuses(target)
        deadline.extend(time.monotonic() - started)  # it has a deadline of its own
        if refused:
            raise _FailedError(Reason.ROBOTS_DISALLOWED, refused)

    def _ask_for_robots(self, origin: Target) -> tuple[int, bytes] | None:
        """A host's robots.txt: status and body; None where it cannot be reached."""
        held = Held(self._memory)
        deadline = Deadline(self._config.deadline_s)
        target = origin
        try:
            for _ in range(self._config.max_redirects + 1):
                answer = self._ask(target, deadline, held, ())
                if isinstance(answer, Answer):
                    return answer.status, answer.data
                target = answer
        except _FailedError as failed:
            if failed.verdict[0] in (Reason.HTTP_CLIENT_ERROR, Reason.OPTED_OUT):
                return 404, b""
        finally:
            held.give_back()
        return None

    def _ask(self, target: Target, deadline: Deadline, held: "Held", remembered: Sequence[str]) -> Answer | Target:
        """One request, when it is its turn: an answer, or where it sends us.

        Raises:
            _FailedError: Neither.
        """
        addresses = self._addresses(target, deadline)
        try:
            with self.turns.turn(target.host) as waited_s:
                deadline.extend(waited_s)
                said = self._exchange(target, addresses, deadline, held, remembered)
        except NotNowError as error:
            raise _FailedError(*error.verdict) from error
        except _FailedError as failed:
            if failed.verdict[0] in (Reason.CONNECTION_FAILED, Reason.TIMED_OUT, Reason.TLS_FAILED):
                self.turns.failed(target.host, failed.verdict)
            else:
                self.turns.succeeded(target.host)
            raise
        self.turns.succeeded(target.host)
        return said

    def _addresses(self, target: Target, deadline: Deadline) -> tuple[Address, ...]:
        try:
            addresses = self.resolver.addresses(target.host, deadline.left_s(self._config.timeout_s))
        except OSError as error:
            raise _FailedError(Reason.HOST_UNKNOWN, f"{target.host}: {error.strerror or error}") from error
        refused = refuse_addresses(target, addresses, self._allowed, self._config.allow_ports)
        if refused is not None:
            raise _FailedError(*refused)
        return addresses

    def _exchange(
        self,
        target: Target,
        addresses: tuple[Address, ...],
        deadline: Deadline,
        held: "Held",
        remembered: Sequence[str],
    ) -> Answer | Target:
        try:
            method = self._method if remembered else "GET"  # a host's rules are read
            connection, response = self._request(target, addresses, deadline, method)
            try:
                said = self._read(target, connection, response, deadline, held, remembered)
                self._keep(target, connection, response)
            except BaseException as error:
                if isinstance(error, _FailedError):
                    self._keep(target, connection, response)
                else:
                    connection.hang_up()
                raise
            return said
        except OverLimitError as error:
            raise _FailedError(Reason.BAD_RESPONSE, f"an answer of {error}") from error
        except CutShortError as error:
            raise _FailedError(
                Reason.IMAGE_TRUNCATED, f"the connection ended early: {error}", is_passing=True
            ) from error
        except TimeoutError as error:
            raise _FailedError(Reason.TIMED_OUT, _said(error, "silent for too long"), is_passing=True) from error
        except ssl.SSLError as error:
            is_passing = not isinstance(error, ssl.SSLCertVerificationError)
            raise _FailedError(Reason.TLS_FAILED, _said(error, "TLS failed"), is_passing=is_passing) from error
        except OSError as error:
            raise _FailedError(Reason.CONNECTION_FAILED, _said(error, "failed"), is_passing=True) from error
        except BadResponseError as error:
            raise _FailedError(Reason.BAD_RESPONSE, f"no HTTP: {error}") from error

    def _request(
        self, target: Target, addresses: tuple[Address, ...], deadline: Deadline, method: Method
    ) -> tuple[Connection, Response]:
        """Sends the request: over a connection that was kept, or else over a new one."""
        connection = self._pool.take(target, addresses)
        if connection is not None:
            try:
                return connection, self._send(connection, target, deadline, method)
            except (ConnectionError, ssl.SSLError):
                connection.hang_up()
                if connection.wire.num_bytes:
                    raise
                # The server closed it while it waited: nothing was answered, so asking again is no second request.
            except BaseException:
                connection.hang_up()
                raise
        connection = self._connect(target, addresses, deadline)
        try:
            return connection, self._send(connection, target, deadline, method)
        except BaseException:
            connection.hang_up()
            raise

    def _send(self, connection: Connection, target: Target, deadline: Deadline, method: Method) -> Response:
        config = self._config
        connection.wire.begin(deadline, config.timeout_s, config.min_rate_bytes_per_s, config.max_header_bytes)
        response = connection.ask(target, self._headers, method)
        if response.headers.num_bytes > config.max_header_bytes:
            raise OverLimitError(f"{response.headers.num_bytes:,} bytes of headers")
        return response

    def _connect(self, target: Target, addresses: tuple[Address, ...], deadline: Deadline) -> Connection:
        errors: list[OSError] = []
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                context = self._tls() if target.scheme == "https" else None
                return connect(target, address, context, deadline, self._config.timeout_s)
            except OSError as error:
                errors.append(error)
        raise errors[0]

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            with self._lock:
                if self._context is None:
                    self._context = tls_context()
        return self._context

    def _read(
        self,
        target: Target,
        connection: Connection,
        response: Response,
        deadline: Deadline,
        held: "Held",
        remembered: Sequence[str],
    ) -> Answer | Target:
        refusal = opt_out(response.headers, self._robot) if remembered else None
        if refusal is not None:
            self.opted_out.add(*remembered)
            self._discard(connection, response)
            raise _FailedError(Reason.OPTED_OUT, refusal)
        status = response.status
        if 200 <= status < 300:
            coding = response.headers.get("Content-Encoding", "").strip().lower()
            if coding in _CODINGS:
                raise _FailedError(Reason.BAD_RESPONSE, f"Content-Encoding {coding}, which was not asked for")
            return Answer(self._body(connection, response, deadline, held), target.url, status)
        self._discard(connection, response)
        if status in _REDIRECTS:
            return _redirected(target, response.headers.get("Location"))
        self._refuse_status(target, response)
        raise AssertionError("unreachable")

    def _refuse_status(self, target: Target, response: Response) -> None:
        status = response.status
        detail = f"HTTP {status} {response.reason}".rstrip()
        if status in (429, 503):
            pause_s = _retry_after_s(response.headers.get("Retry-After"))
            if pause_s is not None:
                self.turns.pause(target.host, pause_s)
            if status == 429:
                raise _FailedError(Reason.RATE_LIMITED, detail, is_passing=True)
        if status in _NOT_NOW:
            raise _FailedError(Reason.HTTP_NOT_NOW, detail, is_passing=True)
        if 400 <= status < 500:
            raise _FailedError(Reason.HTTP_CLIENT_ERROR, detail)
        if 500 <= status < 600:
            raise _FailedError(Reason.HTTP_SERVER_ERROR, detail, is_passing=status in (500, 502, 503, 504))
        raise _FailedError(Reason.BAD_RESPONSE, detail)

    def _body(self, connection: Connection, response: Response, deadline: Deadline, held: "Held") -> bytes:
        limit = self._config.max_body_bytes
        declared = response.length
        if declared is not None and declared > limit:
            raise _FailedError(
                Reason.BODY_TOO_LARGE, f"{declared:,} bytes are over download.max_body_bytes = {limit:,}"
            )
        pieces: list[bytes] = []
        num_bytes = 0
        while declared is None or num_bytes < declared:
            wanted = _PIECE_BYTES if declared is None else min(_PIECE_BYTES, declared - num_bytes)
            self._hold(held, wanted, deadline)
            # The wire lets no more through than what was set aside, whatever chunk lengths are claimed.
            connection.wire.allow(2 * wanted if response.is_chunked else wanted)
            piece = response.read(wanted)
            num_bytes += len(piece)
            pieces.append(piece)
            if num_bytes > limit:
                raise _FailedError(Reason.BODY_TOO_LARGE, f"over download.max_body_bytes = {limit:,}")
            if len(piece) < wanted:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _hold(self, held: "Held", num_bytes: int, deadline: Deadline) -> None:
        if not held.take(num_bytes, deadline.left_s(self._config.deadline_s)):
            raise _FailedError(
                Reason.TIMED_OUT, "no memory came free in time (download.max_bodies_bytes)", is_passing=True
            )

    def _discard(self, connection: Connection, response: Response) -> None:
        """Reads a short page that nobody wants, so that the connection can be kept; if it can't be read, so be it."""
        if response.length is None or response.length > _MAX_DISCARDED_BYTES:
            return
        connection.wire.allow(response.length)
        with contextlib.suppress(OSError, OverLimitError, CutShortError, BadResponseError):
            response.read(response.length)

    def _keep(self, target: Target, connection: Connection, response: Response) -> None:
        if response.can_be_kept and response.status != _MISDIRECTED:
            self._pool.put(target, connection)
        else:
            connection.hang_up()


class Held:
    """An answer, and what it has of the budget of memory until the block is left; enter it in one thread at a time.

    Attributes:
        said: The answer; or why there is none.

    Args:
        budget: Of all answers.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self.said: Answer | Verdict = Reason.DOWNLOAD_FAILED, "it was not asked for"
        self._budget = budget
        self._num_bytes = 0

    def __enter__(self) -> Answer | Verdict:
        return self.said

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def take(self, num_bytes: int, timeout_s: float) -> bool:
        """Takes more of it; False where none came free in time."""
        if not self._budget.take(num_bytes, timeout_s):
            return False
        self._num_bytes += num_bytes
        return True

    def give_back(self) -> None:
        """Gives back what was taken."""
        if self._num_bytes:
            self._budget.give_back(self._num_bytes)
            self._num_bytes = 0


def user_agent(config: DownloadConfig) -> str:
    """Who we say we are: the truth, with a contact where there is one."""
    try:
        release = version("lacuna-inpainting")
    except PackageNotFoundError:
        release = "0"
    contact = f"; +{config.user_agent_contact}" if config.user_agent_contact else ""
    return f"{config.user_agent_token or DEFAULT_TOKEN}/{release} (collects pictures for model training{contact})"


def _redirected(target: Target, location: str) -> Target:
    if not location:
        raise _FailedError(Reason.BAD_RESPONSE, "a redirect to nowhere")
    with contextlib.suppress(UnicodeError):
        location = location.encode("latin-1").decode()  # headers are read as latin-1
    try:
        found = parse_url(urljoin(target.url, location.strip(" ")))
    except ValueError as error:
        raise _FailedError(Reason.URL_REFUSED, f"redirect: {error}") from error
    if not isinstance(found, Target):
        raise _FailedError(found[0], f"redirect: {found[1]}")
    return found


def _retry_after_s(value: str) -> float | None:
    """Seconds from now; a date counts as what is left until then; what cannot be read counts as nothing."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _said(error: OSError, otherwise: str) -> str:
    text = str(error).strip() or otherwise
    return otherwise if text in ("timed out", "The read operation timed out") else text
