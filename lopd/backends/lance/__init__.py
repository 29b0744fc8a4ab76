"""A store of LanceDB tables."""

from lopd.backends.lance.store import LanceStore as LanceStore
