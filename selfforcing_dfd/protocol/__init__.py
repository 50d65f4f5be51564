"""Prompts x seeds x methods -> videos -> numbers -> one report."""
