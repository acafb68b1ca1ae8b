"""The noise axis, and the processes that turn data into noise."""
