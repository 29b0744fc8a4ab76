"""Where a store's files are: a folder on a local disk, or a prefix in a bucket."""

import os

from lopd.backends.files.contract import Bytes as Bytes
from lopd.backends.files.contract import Files as Files
from lopd.backends.files.contract import Piece as Piece
from lopd.backends.files.contract import Run as Run
from lopd.backends.files.contract import StorageOptions as StorageOptions
from lopd.backends.files.contract import StorePath as StorePath
from lopd.backends.files.contract import bucket_url as bucket_url
from lopd.backends.files.contract import is_damage as is_damage
from lopd.backends.files.contract import local_folder as local_folder
from lopd.backends.files.contract import names_in as names_in
from lopd.backends.files.contract import problem as problem
from lopd.backends.files.contract import reading as reading
from lopd.backends.files.contract import writing as writing
from lopd.backends.files.proving import prove as prove
from lopd.records.files import IN_BUCKETS


def open_files(path: StorePath, storage_options: StorageOptions | None = None) -> Files:
    """Return the files under a local path or a URL.

    s3, gs, az and their kin go through obstore, any other scheme through fsspec; both get `storage_options`.

    Raises:
        MissingDependencyError: the package for this kind of URL is not installed.
        StorePathError: no package knows this kind of URL, or it refuses the options.
    """
    folder = local_folder(path)
    if folder is not None:
        from lopd.backends.files.local import LocalFiles

        return LocalFiles(folder)
    url, options = os.fspath(path), storage_options or {}
    if bucket_url(url).startswith(IN_BUCKETS):
        from lopd.backends.files.cloud import ObstoreFiles

        return ObstoreFiles(url, options)
    from lopd.backends.files.by_fsspec import FsspecFiles

    return FsspecFiles(url, options)
