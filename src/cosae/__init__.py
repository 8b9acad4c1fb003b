"""cosae: train and judge sparse autoencoders with inner-product and cosine scores."""
