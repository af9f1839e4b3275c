"""The demo runs the complete chain on a real model from a package."""
