"""Losses on packed batches: equations in `functional`, the plain path in `reference`."""
