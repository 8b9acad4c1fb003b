"""activations → codes → reconstruction."""
