"""One-off analyses: recipe and result together. They import cosae and define no nn.Module."""
