"""What a user can get wrong."""

from __future__ import annotations


class CosaeError(ValueError):
    """A mistake of the user's that one sentence can put right: what came, what is allowed, what to do."""
