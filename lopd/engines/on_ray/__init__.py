"""Engines on the machines of a Ray cluster."""

from lopd.records.optional import needing as _needing

with _needing("ray", __name__, "ray"):
    from lopd.engines.on_ray.nouns import RayScorer as RayScorer
    from lopd.engines.on_ray.nouns import RaySource as RaySource
