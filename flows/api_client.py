"""Prefect's API for the verbs that set a server up: which server it is, and its refusals as one clear line."""

import contextlib
from collections.abc import Iterator

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import get_current_settings

from infra.errors import TransientError

_REFUSED = (401, 403)


def server_url() -> str:
    """The server that Prefect's settings name.

    Raises:
        ValueError: They name none: Prefect would start one that is gone with this process, and what it was told too.
    """
    url = get_current_settings().api.url
    if url is None:
        raise ValueError("PREFECT_API_URL: not set; start a server with `prefect server start`, and set it to its API")
    return url


@contextlib.contextmanager
def server_client() -> Iterator[SyncPrefectClient]:
    """A client of the server that Prefect's settings name.

    Raises:
        ValueError: They name none, or it refuses us.
        TransientError: It does not answer, or not as it should.
    """
    url = server_url()
    try:
        with get_client(sync_client=True) as client:
            yield client
    except (httpx.HTTPError, RuntimeError) as error:
        # A client's first request compares versions, and wraps what goes wrong with it.
        cause = error if isinstance(error, httpx.HTTPError) else error.__cause__
        if not isinstance(cause, httpx.HTTPError):
            raise
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code in _REFUSED:
            raise ValueError(
                f"PREFECT_API_AUTH_STRING: the server at {url} refuses it ({cause.response.status_code}); set it "
                "to what PREFECT_SERVER_API_AUTH_STRING is there, as user:password"
            ) from None
        said = " ".join(str(cause).split()) or type(cause).__name__
        if isinstance(cause, httpx.HTTPStatusError):
            raise TransientError(f"PREFECT_API_URL: the server at {url} does not answer as it should: {said}") from None
        raise TransientError(f"PREFECT_API_URL: the server at {url} does not answer: {said}") from None
