"""The name of `cosae.interop` in version 0.1."""

raise ModuleNotFoundError(
    "cosae.share is cosae.interop now: import cosae.interop.read for read_sae, cosae.interop.hub for push and pull, "
    "cosae.interop.saelens.plugin for SAELens, or cosae.interop.NAME for cosae.share.NAME.",
    name="cosae.share",
)
