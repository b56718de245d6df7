"""boto3 as we use it: the client's settings, and its many errors turned into our few."""

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

from boto3.session import Session
from botocore import exceptions as aws
from botocore.config import Config
from botocore.parsers import ResponseParserError

from infra.errors import TransientError
from infra.storage import ObjectNotFoundError

LOST = frozenset({"PreconditionFailed", "412"})
RACING = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
NOT_IMPLEMENTED = frozenset({"NotImplemented", "501"})
OUT_OF_RANGE = frozenset({"InvalidRange", "416"})

_NOT_FOUND = frozenset({"NoSuchKey", "NotFound", "404"})
_DENIED = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "403",
    }
)
_WORTH_A_RETRY = frozenset({"RequestTimeout", "SlowDown", "BadDigest"})
_RETRIED_STATUS = frozenset({408, 409, 412, 429})
_NO_CREDENTIALS = (aws.NoCredentialsError, aws.PartialCredentialsError)
_BROKEN_CONNECTION = (
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    aws.ChecksumError,
    aws.CredentialRetrievalError,
)
_AMAZON = re.compile(r"\.(amazonaws\.(com(\.cn)?|eu)|api\.aws)$")


def make_client(connect_timeout_s: float = 10, read_timeout_s: float = 60, attempts: int = 1) -> Any:
    """Make an S3 client from boto3's own settings: environment, profile, instance role.

    Args:
        connect_timeout_s: How long one attempt to connect may take.
        read_timeout_s: How long the server may be silent.
        attempts: How often a request is sent in all. Once: the store itself sends it again, and knows when to stop.

    Returns:
        A boto3 S3 client (boto3 makes its classes at run time, so it has no type).

    Raises:
        ValueError: The settings are not usable.
    """
    common = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        tcp_keepalive=True,
        max_pool_connections=32,
    )
    try:
        session = Session()
        client = session.client("s3", config=common)
    except aws.BotoCoreError as error:
        raise ValueError(f"root: S3 cannot be used: {_one_line(error)}; correct the AWS settings") from error
    except ValueError as error:
        raise ValueError(f"root: {error}; correct AWS_ENDPOINT_URL (such as http://127.0.0.1:8333)") from None
    host = client.meta.endpoint_url.partition("://")[2].partition("/")[0].partition(":")[0]
    if _AMAZON.search(host):
        return client
    client.close()
    # Other servers: many know neither the checksum trailers that boto3 sends since 1.36, nor buckets as host names.
    other = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"},
    )
    return session.client("s3", config=common.merge(other))


def error_code(error: aws.ClientError) -> str:
    """Return S3's name for what went wrong, or the HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def translated_errors(endpoint: str, bucket: str, key: str, uri: str, passed: Collection[str] = ()) -> Iterator[None]:
    """Turn boto3's errors into ours, one line each.

    Args:
        endpoint: Where the requests go.
        bucket: The bucket that they are about.
        key: The object that they are about; may be empty.
        uri: The object's full name.
        passed: Codes that the caller handles: these come through as botocore's ClientError.

    Raises:
        ObjectNotFoundError: There is no such object.
        ValueError: The request can never succeed: no such bucket, no rights, no credentials, bad settings.
        TransientError: The server cannot be reached, failed, or asks to be called later.
    """
    place = f"bucket '{bucket}' at {endpoint}"
    try:
        yield
    except aws.ClientError as error:
        if error_code(error) in passed:
            raise
        _raise_named(error, place, key, uri)
    except (*_BROKEN_CONNECTION, ResponseParserError) as error:  # the latter: a listing that was cut
        raise TransientError(f"{place} cannot be reached: {_one_line(error)}") from error
    except _NO_CREDENTIALS as error:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise ValueError(f"{place}: {_one_line(error)}; {advice}") from error
    except aws.BotoCoreError as error:
        raise ValueError(f"{place}: {_one_line(error)}; correct the AWS settings") from error


def _raise_named(error: aws.ClientError, place: str, key: str, uri: str) -> NoReturn:
    code = error_code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        raise ValueError(f"{place} does not exist; create it or choose another --root") from error
    if code in _NOT_FOUND:
        raise ObjectNotFoundError(key, uri) from error
    if code in _DENIED:
        raise ValueError(f"{place}: access denied ({code}); check the credentials and their rights there") from error
    line = f"{uri}: {_one_line(error)}, from {place}"
    if 400 <= status < 500 and status not in _RETRIED_STATUS and code not in _WORTH_A_RETRY:
        raise ValueError(line) from error
    raise TransientError(line) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
