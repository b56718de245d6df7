"""What `infra.child` holds, under the name it had: for code that still asks here."""

from infra.child import EVENT_PREFIX, emit, run_as_child

__all__ = ["EVENT_PREFIX", "emit", "run_as_child"]
