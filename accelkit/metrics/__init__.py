"""How good samples are: feature extractors and the distances between sets of features."""
