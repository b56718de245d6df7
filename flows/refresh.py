"""The flow that a schedule runs: what is new in the metadata, due, withdrawn or opted out, and only that is made."""

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prefect import flow, tags

from flows import events, tasks
from flows.config import PipelineConfig, resolve
from flows.deployments import cancel_children, staged
from flows.form import ROOT, RefreshForm
from flows.plan import data_stage
from flows.prepare import stands
from flows.refresh_record import RefreshRecord, end_forgetting, read_record, write_record
from flows.results import RefreshResult, StageSummary, TrainSummary
from flows.store import absolute_root, read_manifest
from flows.train import trained
from infra.storage import ObjectStore, open_store
from preprocessing.contracts.manifest import Manifest, dataset_prefix, find_manifest

if TYPE_CHECKING:
    from preprocessing.drift import Lineage

LOGGER = logging.getLogger(__name__)


@flow(name="refresh", on_cancellation=[cancel_children], on_crashed=[cancel_children])
def refresh(config: RefreshForm, root: str = ROOT, train: bool = False) -> RefreshResult:
    """Makes the dataset of the current metadata, takes over what the last one has, and says what is new.

    It may be killed anywhere and started again, or run twice at once: the effect is that of one run. What a gate
    refuses (`refresh` in the config) is made, and reported, but the next refresh compares with the last good one.

    Args:
        config: What to make: a recipe, and settings over it.
        root: The object store's root: a folder, file:///… or s3://bucket/prefix.
        train: Whether to train on the dataset; a training that stands there is not done again.
    """
    config, root = resolve(config), absolute_root(root)
    store, started_at = open_store(root), datetime.now(UTC)
    last, etag = read_record(store, config.recipe)
    tasks.ensure_base(config)
    selected = _made("select", config, root, None)
    num_opted_out = _recheck(config, store, last, started_at)
    selection = _selection_in_force(config, store, last, selected.prefix)
    _take_over_pictures(config, store, last, selection)
    downloaded = _made("download", config, root, selection)
    parent = _to_encode(config, store, last, downloaded.prefix)
    _take_over_rows(config, store, last, parent)
    encoded = _made("encode", config, root, parent)
    changed = last is None or last.digest != encoded.digest
    report, (num_new, num_gone, num_kept), num_forgotten = None, (0, 0, encoded.num_out), 0
    if changed:
        report, (num_new, num_gone, num_kept) = _compare(config, store, last, encoded.prefix)
    record = RefreshRecord(
        digest=encoded.digest,
        prefix=encoded.prefix,
        num_out=encoded.num_out,
        base=selected.digest,
        selection=selection,
        started_at=started_at,
        rechecked_at=_rechecked_at(config, last, started_at),
        source=_source(config),
        forget_from=_forget_from(config, last, changed),
    )
    stands_now = write_record(store, config.recipe, record, etag)
    if changed and stands_now:
        parents = read_manifest(store, encoded.prefix).parents
        events.dataset_accepted(encoded, parents, started_at.isoformat())
    if stands_now:  # not before: of what a gate refused, or a later refresh overtook, nothing may be forgotten
        num_forgotten = _forget_withdrawn(config, store, record, selected.prefix)
    _tidy(config, store, selection, parent)
    stages = {summary.stage: summary for summary in (selected, downloaded, encoded)}
    return RefreshResult(
        datasets={name: summary.manifest_uri for name, summary in stages.items()},
        stages=stages,
        changed=changed,
        previous_digest=None if last is None else last.digest,
        num_new=num_new,
        num_gone=num_gone,
        num_kept=num_kept,
        num_opted_out=num_opted_out,
        num_forgotten=num_forgotten,
        report=report,
        train=_train(config, root, encoded.prefix) if train else None,
    )


def _train(config: PipelineConfig, root: str, dataset: str) -> TrainSummary:
    with tags("lacuna"):  # a flow that runs inside this one does not get its tags by itself
        return trained(config, root, dataset)


def _made(stage: str, config: PipelineConfig, root: str, parent: str | None) -> StageSummary:
    """A dataset, made here or by its deployment."""

    def here() -> StageSummary:
        if parent is None:
            return tasks.select(config, root)
        return tasks.download(config, root, parent) if stage == "download" else tasks.encode(config, root, parent)

    parameters = {"root": root, "stage": stage} | ({} if parent is None else {"parent": parent})
    return staged(stage, config, here, lambda: stands(stage, config, root, parent), parameters)


def _recheck(config: PipelineConfig, store: ObjectStore, last: RefreshRecord | None, now: datetime) -> int:
    """Asks servers whose turn it is whether they have opted out; the demo world never does."""
    found = None if last is None else find_manifest(store, last.prefix)
    days = config.refresh.recheck_days
    if last is None or last.rechecked_at is None or found is None or days is None or config.source.is_demo:
        return 0
    from preprocessing.download.recheck import recheck

    return recheck(store, last.prefix, found, config.download, since=last.rechecked_at, now=now, days=days)


def _rechecked_at(config: PipelineConfig, last: RefreshRecord | None, now: datetime) -> datetime | None:
    if last is None or last.rechecked_at is None or config.refresh.recheck_days is not None:
        return now
    return last.rechecked_at  # nobody was asked


def _selection_in_force(config: PipelineConfig, store: ObjectStore, last: RefreshRecord | None, selected: str) -> str:
    """The selection to download: the one of the metadata, or a round of it, where rows of its download are outdated."""
    from preprocessing.reuse import RoundStage, agreed_round, outdated_rows
    from preprocessing.stage import run_stage

    prefix = selected
    if last is not None and last.selection is not None and last.base == read_manifest(store, selected).digest:
        prefix = last.selection if find_manifest(store, last.selection) is not None else selected
    while True:
        selection = read_manifest(store, prefix)
        downloaded = dataset_prefix("download", data_stage("download", config, store, selection).digest)
        done = find_manifest(store, downloaded)
        uids = [] if done is None else outdated_rows(store, downloaded, done)
        if done is None or not uids:
            return prefix
        round_ = RoundStage(prefix, selection, agreed_round(store, done.digest, uids))
        run_stage(store, round_)
        prefix = dataset_prefix("select", round_.digest)


def _take_over_pictures(config: PipelineConfig, store: ObjectStore, last: RefreshRecord | None, selection: str) -> None:
    """Names the last download as the one of which the next may take over pictures, and their encodings."""
    from preprocessing.reuse import say_previous

    before = _download_of(store, last)
    if last is None or before is None:
        return
    prefix, manifest = before
    # Only what would be encoded to the last dataset again needs no picture.
    is_alike = data_stage("encode", config, store, manifest).digest == last.digest
    digest = data_stage("download", config, store, read_manifest(store, selection)).digest
    say_previous(store, "download", digest, prefix, encoded=last.prefix if is_alike else None)


def _take_over_rows(config: PipelineConfig, store: ObjectStore, last: RefreshRecord | None, parent: str) -> None:
    from preprocessing.reuse import say_previous

    if last is not None:
        say_previous(store, "encode", _encode_digest(config, store, parent), last.prefix)


def _to_encode(config: PipelineConfig, store: ObjectStore, last: RefreshRecord | None, downloaded: str) -> str:
    """The download to encode: the last one, where the new one has the same rows after all."""
    from preprocessing.reuse import have_same_rows

    before = _download_of(store, last)
    if last is None or before is None or before[0] == downloaded:
        return downloaded
    prefix, manifest = before
    if data_stage("encode", config, store, manifest).digest != last.digest:
        return downloaded
    return prefix if have_same_rows(store, before, (downloaded, read_manifest(store, downloaded))) else downloaded


def _download_of(store: ObjectStore, last: RefreshRecord | None) -> tuple[str, Manifest] | None:
    """What the last refresh's dataset was made from: key and manifest; None where one of the two is gone."""
    encoded = None if last is None else find_manifest(store, last.prefix)
    if encoded is None:
        return None
    prefix = dataset_prefix("download", encoded.parents["download"])
    manifest = find_manifest(store, prefix)
    return None if manifest is None else (prefix, manifest)


def _compare(
    config: PipelineConfig, store: ObjectStore, last: RefreshRecord | None, encoded: str
) -> tuple[str, tuple[int, int, int]]:
    """Reports how the dataset differs from the last one, and asks the gates.

    Returns:
        URI of the report; counts of rows that are new, gone and in both.
    """
    from preprocessing.drift import check_gates, compare, write_report

    before = None if last is None else _lineage(store, last.prefix)
    now = _lineage(store, encoded)
    assert now is not None
    drift = compare(store, before, now)
    report = store.uri_of(write_report(store, drift, config.refresh))
    check_gates(drift, config.refresh, report)
    return report, (drift.num_new, len(drift.gone), drift.num_kept)


def _forget_from(config: PipelineConfig, last: RefreshRecord | None, changed: bool) -> str | None:
    """Key of the dataset of which withdrawn rows are to be forgotten: the last one, or an earlier one not done with."""
    if last is None or not config.refresh.forget_withdrawn:
        return None
    found = last.forget_from or (last.prefix if changed else None)
    return found if found is not None and _is_same_source(config, last) else None


def _forget_withdrawn(config: PipelineConfig, store: ObjectStore, record: RefreshRecord, selected: str) -> int:
    """Forgets what was withdrawn, and notes that this is done; a refresh that is killed here is ended by the next."""
    from preprocessing.withdrawn import forget_withdrawn

    before = None if record.forget_from is None else find_manifest(store, record.forget_from)
    num_forgotten: int | None = 0
    if record.forget_from is not None and before is not None:
        num_forgotten = forget_withdrawn(
            store,
            (record.forget_from, before),
            (record.prefix, read_manifest(store, record.prefix)),
            (selected, read_manifest(store, selected)),
            max_share=config.refresh.max_withdrawn_share,
        )
    if num_forgotten is not None and record.forget_from is not None:
        end_forgetting(store, config.recipe, record)
    return num_forgotten or 0


def _source(config: PipelineConfig) -> tuple[str, ...]:
    """Where the metadata is; of the demo world, which one."""
    demo = config.source.demo
    return (f"demo:{demo.seed}:{demo.port}",) if config.source.is_demo else tuple(sorted(config.source.patterns))


def _is_same_source(config: PipelineConfig, last: RefreshRecord | None) -> bool:
    """Whether rows that are gone were withdrawn; where the metadata is another, they may stand in the one before."""
    if last is not None and last.source == _source(config):
        return True
    LOGGER.warning("source.metadata is not what the last refresh read: which rows were withdrawn cannot be told")
    return False


def _lineage(store: ObjectStore, prefix: str) -> "Lineage | None":
    """A dataset and what it was made from; None where it is gone."""
    from flows.plan import dataset_lineage
    from preprocessing.drift import Lineage

    manifest = find_manifest(store, prefix)
    if manifest is None:
        return None
    found = {item.stage: item for _, item in dataset_lineage(store, prefix, manifest)}
    return Lineage(prefix, found)


def _tidy(config: PipelineConfig, store: ObjectStore, selection: str, parent: str) -> None:
    """Takes back what was said for stages that are complete now."""
    from preprocessing.reuse import forget_previous

    forget_previous(store, "download", data_stage("download", config, store, read_manifest(store, selection)).digest)
    forget_previous(store, "encode", _encode_digest(config, store, parent))


def _encode_digest(config: PipelineConfig, store: ObjectStore, downloaded: str) -> str:
    return data_stage("encode", config, store, read_manifest(store, downloaded)).digest
