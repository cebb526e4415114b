"""Metrics of generated images, as running sums."""
