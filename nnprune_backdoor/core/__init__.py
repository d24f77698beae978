"""What a model, its neurons, its clean images and its scores are."""
