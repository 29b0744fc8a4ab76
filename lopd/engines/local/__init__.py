"""Several engines on this machine, each in a process of its own, for example one per GPU."""

from lopd.engines.local.nouns import LocalScorer as LocalScorer
from lopd.engines.local.nouns import LocalSource as LocalSource
