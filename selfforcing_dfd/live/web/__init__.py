"""The live page: its files, its messages, and the work behind each connection."""
