"""Datasets on the Hub: one split at one revision."""

from typing import Any

import datasets

from transencoder.errors import InputError
from transencoder.runtime.accelerator import log
from transencoder.runtime.records import HUB_COMMITS, hub_commit

NOT_ASKED = "unknown (the Hub was not asked, the cache has {})"


def load_split(
    hub_id: str, split: str, config: str | None = None, revision: str | None = None, data_files: str | None = None
) -> datasets.Dataset:
    """Load one split of a dataset, from the Hub or from the local cache.

    Args:
        split: as `datasets.load_dataset` takes it, parts such as "train[:1000]" too.
        revision: commit, branch or tag; main by default. The commit is logged, and kept in `HUB_COMMITS`.
        data_files: a file of the repository, where it is no dataset by itself.
    Raises:
        InputError: no such dataset, revision or split, or the Hub cannot be reached.
    """
    options: dict[str, Any] = {"data_files": data_files} if data_files else {}
    try:
        table = datasets.load_dataset(hub_id, config, split=split, revision=revision, **options)
    except Exception as error:  # the library raises a dozen types for "not there", "no network", "no such split"
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        where = f"{hub_id}{f' ({config})' if config else ''}, revision {revision or 'main'}, split {split}"
        raise InputError(f"{where}: cannot be loaded from the Hub ({reason})") from error
    if hub_id not in HUB_COMMITS:
        HUB_COMMITS[hub_id] = hub_commit(hub_id, revision=revision) or NOT_ASKED.format(revision or "main")
        log(f"{hub_id}: commit {HUB_COMMITS[hub_id]}")
    return table
