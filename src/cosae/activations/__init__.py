"""text → tokens → activations."""
