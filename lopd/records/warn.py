"""Warnings that point to the line of the user's program that led to them, however many frames of lopd lie between."""

import sys
import warnings


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the innermost frame that is not lopd's own; verbs call one another, and a generator runs where it is asked for its next value."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("lopd."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
