"""SAEs pushed to the Hugging Face hub and pulled from it."""

from cosae.interop.hub.transfer import preview, pull, push

__all__ = ["preview", "pull", "push"]
