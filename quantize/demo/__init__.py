"""The embedded default: a real model from a package, through the whole chain."""
