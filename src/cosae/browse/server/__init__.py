"""The feature browser: a store's pages, served on this machine or written as plain files."""

from cosae.browse.server.serve import serve
from cosae.browse.server.static import write_static

__all__ = ["serve", "write_static"]
