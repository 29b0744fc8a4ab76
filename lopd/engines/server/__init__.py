"""Models that servers serve over HTTP."""

from lopd.errors import MissingDependencyError as _MissingDependencyError

try:
    import httpx2  # noqa: F401  # the modules below need it
except ImportError as error:
    raise _MissingDependencyError(f"Served engine: {error.name} is not installed; pip install 'lopd[server]'.") from error

from lopd.engines.server.dialect import Costs as Costs
from lopd.engines.server.nouns import ServerScorer as ServerScorer
from lopd.engines.server.nouns import ServerSource as ServerSource
from lopd.engines.server.servers import Servers as Servers
