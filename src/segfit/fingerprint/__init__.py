"""Measuring a dataset."""
