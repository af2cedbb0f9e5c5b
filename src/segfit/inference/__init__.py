"""Prediction; knows nothing of training."""
