"""Places of stores, on disk and in a bucket, with or without the proxy that makes requests fail."""

import pytest
from crash_worker import Place, provenance_of, rollout, scores
from s3_server import S3Server

from lopd.backends.zarr.store import ZarrStore


def fill(place: Place, first: int = 0, n: int = 4) -> ZarrStore:
    """Make a store of these rows, scored in both columns, by a connection without faults."""
    store: ZarrStore = place.open_or_create()
    store.append([rollout(i) for i in range(first, first + n)])
    for column in ("teacher", "ref"):
        store.append_scores(column, provenance_of(column), [scores(column, i) for i in range(first, first + n)])
    return store


@pytest.fixture
def place(s3: S3Server) -> Place:
    """Return a place in the bucket, reached directly; nothing is there yet."""
    return Place("zarr", s3.new_url(), s3.storage_options)
