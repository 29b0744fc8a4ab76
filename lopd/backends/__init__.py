"""Stores: in memory, as Zarr v3 segments and as LanceDB tables, on a local disk or in a bucket; `ragged` holds what every store shares."""
