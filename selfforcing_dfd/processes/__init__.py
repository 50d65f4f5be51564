"""Several processes that work together: how they meet, talk, and end together."""
