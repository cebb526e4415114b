"""Records: their fields, their repetitions, and what tells one from another."""
