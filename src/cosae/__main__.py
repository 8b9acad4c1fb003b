"""`python -m cosae`: the same as `cosae`."""

from cosae.cli import main

main()
