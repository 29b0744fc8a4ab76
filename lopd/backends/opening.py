"""The durable store at a URL, whichever kind it is."""

from lopd.backends.files import StorageOptions, StorePath, names_in, open_files
from lopd.backends.zarr.format import METADATA_FILE
from lopd.errors import StoreNotFoundError
from lopd.protocols import DurableStore


def open_store(path: StorePath, storage_options: StorageOptions | None = None) -> DurableStore:
    """Return the `ZarrStore` or `LanceStore` that is there; a Zarr group at the root means a `ZarrStore`.

    Args:
        path: a local path or a URL.
        storage_options: credentials and endpoints, as the store's own `open` takes them.

    Raises:
        StoreNotFoundError: nothing, or nothing of lopd, is there.
        StoreReadError: the storage refused to list what is there.
        CorruptStoreError: a store is there, but damaged, or of another schema version.
        MissingDependencyError: the package for this kind of store or URL is not installed.
    """
    files = open_files(path, storage_options)
    names = names_in(files)
    if names in ([], [files.url]):
        raise StoreNotFoundError(
            f"Store {files.url}: there is no folder with anything in it, expected a store; check the path, or create one there."
        )
    if METADATA_FILE in names:
        from lopd.backends.zarr.store import ZarrStore

        return ZarrStore(files)
    from lopd.backends.lance.store import LanceStore

    return LanceStore(files)
