"""Datasets: layouts, checks, splits, phantoms."""
