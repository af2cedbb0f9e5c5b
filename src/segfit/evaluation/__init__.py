"""Metrics of label maps and their summaries."""
