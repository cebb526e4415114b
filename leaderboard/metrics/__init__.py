"""Metrics of generated images, computed from running sums."""
