"""The report of a comparison, from its results to the page."""
