"""`python -m benchmark speed`: speed of the suite as ratios within one run."""
