"""Training: the objectives, the ragged loop with its EMA teacher, and the run directory."""
