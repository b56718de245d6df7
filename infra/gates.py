"""The validation gate: what the channel ``stable`` may point to.

The gate reads the report itself, where the validation committed it, and is asked by `infra.channels.move_channel`, the
one place in which a channel moves. What it was asked, and of which report, stands in the pointer, so that anybody can
ask it again.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from infra.bundles import MANIFEST_NAME, parse_manifest
from infra.errors import ContractError, GateError
from infra.storage import ObjectNotFoundError, ObjectStore, sha256_of_bytes


class Gate(BaseModel):
    """What is asked.

    Attributes:
        report: Prefix of the validation's report: a bundle whose metadata has a ``summary``, metric → value.
        minimum: Metric → the least that it must be; without any, a report of the same step is enough.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    report: str
    minimum: dict[str, float] = Field(default_factory=dict)


class PassedGate(Gate):
    """A gate that was passed, as it stands in a channel's pointer.

    Attributes:
        report_sha256: Of the report's ``MANIFEST.json``.
    """

    report_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def pass_gate(store: ObjectStore, gate: Gate, run_id: str, step: int) -> PassedGate:
    """Hold a report against the gate.

    Args:
        store: Where the report is.
        gate: What is asked.
        run_id: Whose report it must be.
        step: Of which step.

    Raises:
        GateError: A metric is below its minimum, or no number, or there is no report.
        ContractError: It is another run's or step's report.
    """
    key = f"{gate.report}/{MANIFEST_NAME}"
    try:
        data = store.read(key)
    except ObjectNotFoundError:
        raise GateError(f"there is no report at {store.uri_of(gate.report)}; validate the checkpoint first") from None
    report = parse_manifest(data, store.uri_of(key))
    if (report.kind, report.run_id, report.step) != ("report", run_id, step):
        raise ContractError(
            f"gate: {gate.report} is a {report.kind} of {report.run_id} step {report.step}, not the report of {run_id} "
            f"step {step}"
        )
    summary = report.metadata.get("summary")
    reason = below_minimum(gate.minimum, summary if isinstance(summary, dict) else {})
    if reason is not None:
        raise GateError(reason)
    return PassedGate(**gate.model_dump(), report_sha256=sha256_of_bytes(data))


def below_minimum(minimum: Mapping[str, float], metrics: Mapping[str, Any]) -> str | None:
    """Say which metrics are below their minimum, or no numbers at all; None if none is."""
    below = []
    for name, least in minimum.items():
        value = metrics.get(name)
        if not isinstance(value, int | float) or math.isnan(value):
            below.append(f"{name} is no number")
        elif value < least:
            below.append(f"{name} {value:.4g} < {least:.4g}")
    return None if not below else f"below publish.stable_min: {', '.join(below)}"
