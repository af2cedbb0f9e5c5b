"""Choosing what is handed over: the best configuration or ensemble, and its post-processing."""
