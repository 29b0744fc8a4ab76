"""Stores: in memory, and as Zarr v3 on a local disk; `ragged` holds what every store shares."""
