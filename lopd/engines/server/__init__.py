"""Models that servers serve over HTTP."""

from lopd.records.optional import needing as _needing

with _needing("httpx2", __name__, "server"):
    from lopd.engines.server.dialect import Costs as Costs
    from lopd.engines.server.nouns import ServerScorer as ServerScorer
    from lopd.engines.server.nouns import ServerSource as ServerSource
    from lopd.engines.server.servers import Servers as Servers
