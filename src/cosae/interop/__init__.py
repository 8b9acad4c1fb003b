"""One package or module a peer library, imported when it is called."""
