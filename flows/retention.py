"""When raw pictures go, and when they are fetched again: what the data tasks ask. No pyarrow at import."""

import logging

from flows.config import PipelineConfig
from flows.plan import data_stage
from flows.store import read_manifest
from infra.errors import TransientError
from infra.storage import open_store
from preprocessing.contracts.manifest import dataset_prefix, find_manifest

LOGGER = logging.getLogger(__name__)


def fetch_again_if_needed(config: PipelineConfig, root: str, selected: str) -> None:
    """Lets a download dataset be made again whose pictures are gone, if what is to be encoded of it is not there.

    In a refresh, rows that the last dataset has need no picture: what is encoded of them is taken over.

    Args:
        config: Of the pipeline.
        root: Of the store.
        selected: Key of the folder of the selection.
    """
    store = open_store(root)
    stage = data_stage("download", config, store, read_manifest(store, selected))
    downloaded = find_manifest(store, dataset_prefix("download", stage.digest))
    if downloaded is None or not any(file.without for file in downloaded.files("rows")):
        return
    encoded = dataset_prefix("encode", data_stage("encode", config, store, downloaded).digest)
    if find_manifest(store, encoded) is not None:
        return
    from preprocessing.retention import are_pictures_needed, reopen
    from preprocessing.reuse import find_previous

    if are_pictures_needed(store, downloaded, find_previous(store, "download", downloaded.digest)):
        reopen(store, downloaded)


def delete_encoded_pictures(config: PipelineConfig, root: str, downloaded: str) -> None:
    """Deletes the pictures of a download dataset that has just been encoded, where the config does not keep them.

    A store that fails here fails nobody: the next run deletes them.

    Args:
        config: Of the pipeline.
        root: Of the store.
        downloaded: Key of the dataset's folder.
    """
    if config.retention.keep_pictures:
        return
    from preprocessing.retention import delete_pictures

    store = open_store(root)
    try:
        delete_pictures(store, read_manifest(store, downloaded), config.retention)
    except TransientError as error:
        LOGGER.warning("the pictures are deleted another time: %s", error)
