"""Methods of other libraries that a bench compares with."""
