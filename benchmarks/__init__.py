"""Scripts behind recorded figures; each prints its ratio and can record it."""
