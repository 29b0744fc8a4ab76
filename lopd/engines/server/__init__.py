"""Models that servers serve over HTTP."""

from lopd.engines.server.nouns import ServerScorer as ServerScorer
from lopd.engines.server.nouns import ServerSource as ServerSource
from lopd.engines.server.pool import Servers as Servers
