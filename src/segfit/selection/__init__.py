"""Choosing what is handed over."""
