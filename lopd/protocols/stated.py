"""What a loss, a store or a student may state besides its noun; guards and messages ask for it with `isinstance`."""

from collections.abc import Collection
from typing import Protocol, runtime_checkable


@runtime_checkable
class StatesCorrection(Protocol):
    """What a loss, or its objective, may state besides, so that guards can warn of it; without it they do not warn."""

    @property
    def uncorrected(self) -> bool:
        """Whether it takes the stored rollouts for the student's own: it has neither an importance ratio nor another answer to drift."""
        ...


@runtime_checkable
class StatesRatio(Protocol):
    """What a loss, or its objective, may also state."""

    @property
    def ratioless(self) -> bool:
        """Whether it surely has no importance ratio to what drew the tokens, though it may have another answer to drift."""
        ...


@runtime_checkable
class StatesBaseline(Protocol):
    """What a loss, or its objective, may also state."""

    @property
    def baselined(self) -> bool:
        """Whether it adds a baseline to advantages, which is neutral only if the weight of a token does not depend on later ones."""
        ...


@runtime_checkable
class StatesLabels(Protocol):
    """What a loss, or its objective, may also state."""

    @property
    def ignores_labels(self) -> bool:
        """Whether it surely reads no labels."""
        ...


@runtime_checkable
class StatesName(Protocol):
    """What a store may state besides; messages name one that does not by its `repr`."""

    @property
    def name(self) -> str:
        """Kind and place, in a few words."""
        ...


@runtime_checkable
class StatesEnds(Protocol):
    """What a student may state besides."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Ids at which its responses will end, once it is exported and sampled from."""
        ...
