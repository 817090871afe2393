"""What is said to the user in one sentence, without a traceback."""

from __future__ import annotations


class PolicyError(ValueError):
    """A policy that cannot be trained as it is configured, or where; the message is for the user."""
