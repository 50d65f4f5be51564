"""Measurements beside the package: they need a checkout, and are not installed with it."""
