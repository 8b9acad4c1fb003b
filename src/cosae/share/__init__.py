"""One door per outsider: each peer library has its own module here, imported when it is called."""
