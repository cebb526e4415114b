"""Feature extractors: Inception, and small networks that are shipped with the suite."""
