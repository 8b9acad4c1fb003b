"""Documents → tokens → sequences."""

from cosae.text.documents import read_documents
from cosae.text.packing import sequences
from cosae.text.pylib import Document
from cosae.text.tokenization import tokenize_documents

__all__ = ["Document", "read_documents", "sequences", "tokenize_documents"]
