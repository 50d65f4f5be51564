"""A day on a GPU: every measurement that needs one, in stages of at most ten minutes."""
