"""Prediction: tiles, networks, export to the grid of the input. Knows nothing of training."""
