"""Bring a proved checkpoint to the Hub: its card, and its files."""
