"""Known sets of images that show what the metrics are worth, and their committed results."""
