"""The quality of samples: feature extractors and the distances between sets of features."""
