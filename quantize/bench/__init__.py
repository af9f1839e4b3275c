"""Serving speed, measured by the load generators that people compare with."""
