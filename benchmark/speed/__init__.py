"""`python -m benchmark speed`: how fast the suite is, as ratios within one run."""
