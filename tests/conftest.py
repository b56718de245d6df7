"""What all tests share: an environment that reaches for nothing outside, and a real S3 server."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything is imported that reads them.
os.environ.update(
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="disabled",
    NO_ALBUMENTATIONS_UPDATE="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
)
# Two tests at once must not each take all cores. torch is not imported here: most tests do without.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# The developer's own account must be out of reach.
for _name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[_name]
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

from infra.s3_server import S3Server, start_seaweedfs  # noqa: E402 - after the environment is set


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first: one that a worker begins last is waited for by all."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, for the whole session, on free ports of loopback."""
    with start_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3_root(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a prefix in a fresh bucket, with boto3's environment set for it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture(params=["folder", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's root in each backend."""
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_root")
