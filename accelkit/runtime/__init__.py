"""A schedule at work on a model: put on, run, and taken off again."""
