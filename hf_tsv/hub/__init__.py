"""The Hugging Face Hub: pinned reads, parallel downloads, checked pushes.

The client retries only some of its calls. Here every call is retried, and every failure becomes a
[`RepoError`] that says what to do.
"""

from hf_tsv.hub.collections import add_to_collection, collection_slug, writable_collection
from hf_tsv.hub.downloads import Wanted, download, missing, uncached
from hf_tsv.hub.listing import Listed, derived
from hf_tsv.hub.ranges import read_range
from hf_tsv.hub.snapshots import (
    WEIGHT_SUFFIXES,
    RepoSnapshot,
    card_dict,
    conversion,
    dataset_commit,
    dataset_file,
    snapshot,
)
from hf_tsv.hub.uploads import (
    Names,
    Pushed,
    check_repo_id,
    commit_files,
    files_to_push,
    push,
    writable_repo_id,
)

__all__ = [
    "WEIGHT_SUFFIXES", "Listed", "Names", "Pushed", "RepoSnapshot", "Wanted", "add_to_collection",
    "card_dict", "check_repo_id", "collection_slug", "commit_files", "conversion",
    "dataset_commit", "dataset_file", "derived", "download", "files_to_push", "missing", "push",
    "read_range", "snapshot", "uncached", "writable_collection", "writable_repo_id",
]  # fmt: skip
