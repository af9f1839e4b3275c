"""Publish a verified checkpoint on the Hub: its card and its files."""
