"""Evaluation and ranking: metrics, cost, protocols, one JSON record per run, and the tables made from the records."""
