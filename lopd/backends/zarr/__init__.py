"""A store of raw Zarr v3 segments and a numbered commit log."""

from lopd.backends.zarr.store import ZarrStore as ZarrStore
