"""Rows that somebody wants gone: tombstones, what holds the rows, and the files cleaned. No prefect, no torch."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from flows.forget_records import Coming, tombstones_at, write_record
from flows.status import datasets_of_run
from flows.store import run_config
from infra.bundles import list_bundles
from infra.channels import read_channel
from infra.storage import ObjectNotFoundError, ObjectStore
from preprocessing.contracts.manifest import Manifest, find_manifest
from preprocessing.contracts.tombstones import REASONS, Kind, Tombstone, Tombstones, Why, read_tombstones
from training.runspec import checkpoints_prefix, run_prefix, step_of

if TYPE_CHECKING:
    from preprocessing.forgotten import Held
    from preprocessing.rewriting import Rewritten
    from training.visits import Place

LOGGER = logging.getLogger(__name__)

_MAX_LIST_BYTES = 1 << 28


@dataclass(frozen=True)
class HoldingDataset:
    """A dataset that holds rows.

    Attributes:
        prefix: Key of its folder.
        stage: ``select``, ``download`` or ``encode``.
        num_rows: How many of its rows are meant.
        num_rejects: How many of its refused rows are.
    """

    prefix: str
    stage: str
    num_rows: int
    num_rejects: int


@dataclass(frozen=True)
class HoldingBundle:
    """A checkpoint, report or export that has to do with rows.

    Attributes:
        prefix: Key of its folder.
        kind: ``checkpoint``, ``report`` or ``export``.
        run_id: Of its run.
        step: Of the run.
        num_rows: How many of the rows stand in what the run trains on; of a report, among the held-out rows.
        num_seen: How many of them had been trained on by that step; of a report: may be shown in it.
        channels: The channels that point to it.
    """

    prefix: str
    kind: str
    run_id: str
    step: int
    num_rows: int
    num_seen: int
    channels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forgotten:
    """What came of it. Nothing in it names an address.

    Attributes:
        uri: The store's root.
        num_new: Tombstones that were not there before.
        num_tombstones: How many there are in all.
        datasets: What holds the rows.
        bundles: What was made of them: ``num_seen`` says whether they are in it.
        in_progress: Keys of the folders of datasets without manifest: what they hold is not known yet.
        is_dry_run: Whether nothing was written.
        compacted: Keys of the folders of the datasets that were cleaned; None where that was not asked for.
        num_files_deleted: Old files that are gone.
    """

    uri: str
    num_new: int
    num_tombstones: int
    datasets: tuple[HoldingDataset, ...]
    bundles: tuple[HoldingBundle, ...]
    in_progress: tuple[str, ...] = ()
    is_dry_run: bool = False
    compacted: tuple[str, ...] | None = None
    num_files_deleted: int = 0

    @property
    def held_by(self) -> list[HoldingBundle]:
        """What was made of the rows and cannot be cleaned."""
        return [bundle for bundle in self.bundles if bundle.num_seen]


def parse_entries(
    named: Mapping[Kind, Sequence[str]], file: Path | None, reason: str, by: str | None
) -> list[Tombstone]:
    """Reads what a user names.

    Args:
        named: Values by kind.
        file: A list: a line ``kind value``, or a value alone whose kind can be told: an address, a hash, else a host.
            Empty lines and those that begin with ``#`` say nothing.
        reason: One of ``REASONS``.
        by: Who asks for it.

    Raises:
        ValueError: One is nothing of its kind; in one line that names the option, or the file's line by its number.
    """
    if reason not in REASONS:
        raise ValueError(f"--reason: {reason!r} is none; choose one of {', '.join(REASONS)}")
    why: Why = reason  # pyright: ignore[reportAssignmentType]  # it is one of them
    entries = []
    for kind, values in named.items():
        for value in values:
            try:
                entries.append(Tombstone.of(kind, value, reason=why, by=by))
            except ValueError as error:
                raise ValueError(f"--{error}") from None
    for number, kind, value in _listed(file) if file is not None else ():
        try:
            entries.append(Tombstone.of(kind, value, reason=why, by=by))
        except ValueError:
            raise ValueError(
                f"--file: line {number} of {str(file)!r} is no {kind}; write such as 'url https://example.com/a.jpg', "
                "'host example.com', 'sha256 …' or 'uid …'"
            ) from None
    return entries


def urls_in(named: Mapping[Kind, Sequence[str]], file: Path | None) -> list[str]:
    """The addresses among what a user names, in clear."""
    listed = [value for _, kind, value in _listed(file) if kind == "url"] if file is not None else []
    return [*named.get("url", ()), *listed]


def _listed(file: Path) -> Iterable[tuple[int, Kind, str]]:
    try:
        if file.stat().st_size > _MAX_LIST_BYTES:
            raise ValueError(f"--file: {str(file)!r} is longer than {_MAX_LIST_BYTES} bytes; cut it")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"--file: {str(file)!r} cannot be read: {error.strerror}; give a text file") from None
    except UnicodeDecodeError:
        raise ValueError(f"--file: {str(file)!r} is not UTF-8; give a text file") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        kind, _, value = text.partition(" ")
        match kind:
            case "url" | "host" | "sha256" | "uid" if value.strip():
                yield number, kind, value.strip()
            case _:
                yield number, _kind_of(text), text


def _kind_of(text: str) -> Kind:
    if "/" in text:  # no host has one; without a scheme it is an address that is refused
        return "url"
    if all(sign in "0123456789abcdefABCDEF" for sign in text) and len(text) in (32, 64):
        return "uid" if len(text) == 32 else "sha256"
    return "host"


def forget(
    store: ObjectStore,
    entries: Sequence[Tombstone],
    *,
    is_dry_run: bool = False,
    with_compaction: bool = False,
    urls: Sequence[str] = (),
) -> Forgotten:
    """Adds tombstones, says what holds the rows, and cleans the files if asked to.

    A picture's sha256 is known only once the picture is here; so its rows' uids are noted, too, and they are never
    asked for again.

    Args:
        store: Where everything stands.
        entries: What is to be forgotten; none: all that is named already, to be cleaned, or looked for again.
        is_dry_run: Write nothing.
        with_compaction: Remove the rows from all complete datasets, too, and from the download ledger.
        urls: Addresses in clear among the entries, by which the ledger is cleaned.

    Raises:
        ContractError: Something in the store cannot be read.
        TransientError: The store failed; what is done is kept, and the same call goes on.
    """
    from preprocessing.forgotten import find_held

    there = read_tombstones(store)
    wanted = list(entries) or there
    held = find_held(store, Tombstones(wanted))
    implied = _implied(store, wanted, held)
    if implied:
        wanted += implied
        held = find_held(store, Tombstones(wanted))
    known = {(entry.kind, entry.value) for entry in there}
    new = {(entry.kind, entry.value) for entry in wanted} - known
    if new and not is_dry_run:
        Tombstones.add(store, wanted)
    channels = _channels(store)
    found = Forgotten(
        uri=store.uri,
        num_new=len(new),
        num_tombstones=len(known | new),
        datasets=tuple(_datasets(held)),
        bundles=tuple(_bundles(store, held, there, channels)),
        in_progress=tuple(_in_progress(store)),
        is_dry_run=is_dry_run,
    )
    if is_dry_run:
        return found
    coming = _coming(store, held, there, found.held_by)
    if found.held_by or coming:
        write_record(store, {bundle.prefix: bundle.num_seen for bundle in found.held_by}, coming)
    if with_compaction:
        done = _compact(store, held, urls)
        found = replace(found, compacted=done.datasets, num_files_deleted=done.num_deleted)
    return found


def _implied(store: ObjectStore, entries: Sequence[Tombstone], held: Sequence["Held"]) -> list[Tombstone]:
    """The uids of rows whose picture is named by its sha256."""
    from preprocessing.forgotten import find_held

    by_hash = [entry for entry in entries if entry.kind == "sha256"]
    if not by_hash or not held:
        return []
    uids = {uid for item in find_held(store, Tombstones(by_hash)) if item.file.kind == "rows" for uid in item.uids}
    return [Tombstone.of("uid", uid, reason=by_hash[0].reason, by=by_hash[0].by) for uid in sorted(uids)]


def _compact(store: ObjectStore, held: Sequence["Held"], urls: Sequence[str]) -> "Rewritten":
    from preprocessing.compact_rows import compact_rows
    from preprocessing.download.compaction import drop_entries

    # Ledger first: once the files are clean, nothing tells the next call which entries are meant.
    drop_entries(store, {uid for item in held for uid in item.uids if uid}, urls)
    return compact_rows(store, Tombstones.load(store))


def _datasets(held: Sequence["Held"]) -> Iterable[HoldingDataset]:
    for prefix in dict.fromkeys(item.prefix for item in held):
        own = [item for item in held if item.prefix == prefix]
        num = {kind: sum(len(item.rows) for item in own if item.file.kind == kind) for kind in ("rows", "rejects")}
        yield HoldingDataset(prefix, own[0].manifest.stage, num["rows"], num["rejects"])


def _in_progress(store: ObjectStore) -> Iterable[str]:
    for stage in store.list_folders("datasets/"):
        for name in store.list_folders(f"datasets/{stage}/"):
            if find_manifest(store, f"datasets/{stage}/{name}") is None:
                yield f"datasets/{stage}/{name}"


# ------------------------------------------------------------------------------------------------ what was made of them


def _channels(store: ObjectStore) -> dict[str, str]:
    """Channel → the bundle that it points to."""
    found = {}
    for info in store.list("channels/"):
        pointer = read_channel(store, PurePosixPath(info.key).stem)
        if pointer is not None:
            found[pointer.channel] = pointer.bundle
    return found


def _bundles(
    store: ObjectStore, held: Sequence["Held"], there: Sequence[Tombstone], channels: Mapping[str, str]
) -> Iterable[HoldingBundle]:
    datasets = {item.prefix for item in held if item.manifest.stage == "encode" and item.file.kind == "rows"}
    for run_id in sorted({*store.list_folders("runs/"), *store.list_folders("exports/")}):
        config = run_config(store, run_id)
        if not datasets.isdisjoint(datasets_of_run(config)):
            for bundle in _bundles_of_run(store, run_id, config, held, there):
                pointing = tuple(sorted(name for name, prefix in channels.items() if prefix == bundle.prefix))
                yield replace(bundle, channels=pointing)


def _bundles_of_run(
    store: ObjectStore,
    run_id: str,
    config: Mapping[str, Any],
    held: Sequence["Held"],
    there: Sequence[Tombstone],
) -> Iterable[HoldingBundle]:
    run = _Run.of(store, run_id, config)
    if run is None:
        return
    rows = run.places(held)
    for kind, folder in (("checkpoint", checkpoints_prefix(run_id)), ("export", f"exports/{run_id}")):
        for prefix in list_bundles(store, folder):
            step = step_of(prefix)
            seen = run.seen(rows, step, lambda digest: run.places_of(_as_it_was(store, there, digest)))
            if rows:
                yield HoldingBundle(prefix, kind, run_id, step, len(rows), len(seen))
    first = next(iter(run.weights))
    shown = sum(len(item.rows) for item in held if item.prefix == first and item.file.split == "validation")
    for prefix in list_bundles(store, f"{run_prefix(run_id)}/validation") if shown else ():
        yield HoldingBundle(prefix, "report", run_id, _step_of_report(prefix), shown, shown)


def _coming(
    store: ObjectStore, held: Sequence["Held"], there: Sequence[Tombstone], held_by: Sequence[HoldingBundle]
) -> dict[str, Coming]:
    """Unfinished runs that have seen none of the rows, and would: a process under way knows no new tombstone."""
    datasets = {item.prefix for item in held if item.manifest.stage == "encode" and item.file.kind == "rows"}
    found = {}
    for run_id in store.list_folders("runs/") if datasets else ():
        config = run_config(store, run_id)
        have_seen = any(bundle.run_id == run_id and bundle.kind != "report" for bundle in held_by)
        if have_seen or datasets.isdisjoint(datasets_of_run(config)):
            continue
        run = _Run.of(store, run_id, config)
        first = None if run is None else run.first_sight(run.places(held), Tombstones(there).digest)
        if first is not None:
            found[run_id] = first
    return found


def _step_of_report(prefix: str) -> int:
    return int(prefix.rpartition("/")[2].split("-")[1])


def _as_it_was(store: ObjectStore, there: Sequence[Tombstone], digest: str) -> "list[Held]":
    """What the tombstones of a digest named: those up to some moment."""
    from preprocessing.forgotten import find_held

    for moment in sorted({entry.at for entry in there}):
        then = Tombstones(entry for entry in there if entry.at <= moment)
        if then.digest == digest:
            return find_held(store, then)
    return []


class _Run:
    """A run as its ``config.json`` and its checkpoints tell it."""

    def __init__(self, store: ObjectStore, run_id: str, config: Mapping[str, Any], manifests: dict[str, Manifest]):
        from training.visits import Visits

        train = config["train"]
        self._store, self._run_id, self._manifests = store, run_id, manifests
        self._batch, self._num_steps = int(train["global_batch_size"]), int(train["num_steps"])
        self.weights: dict[str, float] = dict(config.get("mixture") or {config["dataset_prefix"]: 1.0})
        self._visits = Visits(manifests, self.weights, int(train["seed"]))
        self._gone: dict[str, set[Place]] = {}

    @staticmethod
    def of(store: ObjectStore, run_id: str, config: Mapping[str, Any]) -> "_Run | None":
        """None where its datasets are gone, or another version wrote it."""
        manifests = {}
        for prefix in datasets_of_run(dict(config)):
            manifest = find_manifest(store, prefix)
            if manifest is None:
                return None
            manifests[prefix] = manifest
        try:
            return _Run(store, run_id, config, manifests)
        except (KeyError, TypeError, ValueError) as error:
            LOGGER.warning(
                "runs/%s: its config.json is another version's (%s); what it has seen is not known", run_id, error
            )
            return None

    def places(self, held: Sequence["Held"]) -> "set[Place]":
        """The rows that are trained on."""
        from training.visits import Place

        return {
            Place(item.prefix, item.file.name, place)
            for item in held
            if item.prefix in self._manifests and item.file.kind == "rows" and item.file.split == "train"
            for place in item.places
        }

    def places_of(self, held: Sequence["Held"]) -> "set[Place]":
        """Likewise, and those that have left the files since."""
        from training.visits import Place

        removed = {
            Place(prefix, file.name, place)
            for prefix, manifest in self._manifests.items()
            for file in manifest.files("rows", split="train")
            for place in file.removed
        }
        return self.places(held) | removed

    def seen(self, rows: "set[Place]", step: int, gone_of: "Callable[[str], set[Place]]") -> "set[Place]":
        """Those of some rows that the run had been trained on by a step."""
        from training.visits import Course

        state = self._state(step)
        skips = _skips(state)
        position: int = state["position"] if state.get("step") == step else self._position_of(step, skips)
        gone = []
        for first, digest in state.get("tombstones", []):
            if digest not in self._gone:
                self._gone[digest] = gone_of(digest) if digest else set()
            gone.append((first, self._gone[digest]))
        return self._visits.seen(rows, Course(position, skips, gone))

    def first_sight(self, rows: "set[Place]", in_force: str) -> Coming | None:
        """When the run sees the first of some rows, of which it has seen none, if nobody tells it.

        Args:
            rows: Not forgotten before.
            in_force: Digest of the tombstones that the store has had until now.
        """
        from training.visits import Course

        state = self._state(self._num_steps)
        skips, changes = _skips(state), [(int(first), str(digest)) for first, digest in state.get("tombstones", [])]
        begin, end = int(state.get("position", 0)), self._position_of(self._num_steps, skips)
        if not rows or begin >= end or not self._visits.seen(rows, Course(end, skips)):
            return None
        while end - begin > 1:  # seen by `end`, and not by `begin`
            middle = (begin + end) // 2
            begin, end = (begin, middle) if self._visits.seen(rows, Course(middle, skips)) else (middle, end)
        num_skipped = sum(max(0, min(last, end) - first) for first, last in skips)
        return Coming(
            step=-(-(end - num_skipped) // self._batch),
            position=end - 1,
            tombstones=tuple(sorted({tombstones_at(changes, end - 1), in_force})),
        )

    def _state(self, step: int) -> dict[str, Any]:
        """The state of the checkpoint of a step, or of the first one after it, or of the last one."""
        steps = sorted(step_of(prefix) for prefix in list_bundles(self._store, checkpoints_prefix(self._run_id)))
        chosen = next((found for found in steps if found >= step), steps[-1] if steps else None)
        if chosen is None:
            return {}
        try:
            prefix = next(
                p for p in list_bundles(self._store, checkpoints_prefix(self._run_id)) if step_of(p) == chosen
            )
            return json.loads(self._store.read(f"{prefix}/state.json"))
        except (ObjectNotFoundError, ValueError):
            return {}

    def _position_of(self, step: int, skips: Sequence[tuple[int, int]]) -> int:
        position = step * self._batch
        for first, end in skips:
            if first <= position:
                position += end - first
        return position


def _skips(state: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(int(first), int(end)) for first, end in state.get("skips", {}).get("positions", [])]


def forgotten_json(found: Forgotten) -> dict[str, Any]:
    """The same for programs."""
    return asdict(found) | {"channels": {name: b.prefix for b in found.held_by for name in b.channels}}
