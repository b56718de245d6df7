"""The environment of a command that runs flows."""

import os

import pytest

from flows.server import prefect_server


@pytest.mark.parametrize(("said", "wanted"), [(None, "30"), ("60", "60")])
def test_a_command_beats_as_often_as_a_worker(monkeypatch: pytest.MonkeyPatch, said: str | None, wanted: str) -> None:
    """Else the automation of a server that others use would take it for dead."""
    environment = dict(os.environ, PREFECT_API_URL="http://127.0.0.1:9/api")
    environment.pop("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", None)
    if said is not None:
        environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = said
    monkeypatch.setattr(os, "environ", environment)
    with prefect_server("var/store"):
        assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == wanted
