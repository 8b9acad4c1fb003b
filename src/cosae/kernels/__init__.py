"""The same mathematics, fast."""
