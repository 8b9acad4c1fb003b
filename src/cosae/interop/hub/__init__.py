"""SAEs pushed to the Hugging Face hub and pulled from it."""

from cosae.interop.hub.transfer import pull, push

__all__ = ["pull", "push"]
