"""Evaluation of a trained method: reference statistics, generation in chunks, cost, and the record at its end."""
