"""What several test files share: small models, stores, runs, files of other libraries."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
