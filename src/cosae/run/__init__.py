"""From a recipe to a finished run: the rooms called one after the other. `cosae.run.fit` and `cosae.run.execute`."""
