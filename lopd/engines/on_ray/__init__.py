"""Engines on the machines of a Ray cluster."""

from lopd.engines.on_ray.nouns import RayScorer as RayScorer
from lopd.engines.on_ray.nouns import RaySource as RaySource
