"""Recipes: which matrices of a model are quantized, and how. Names and roles, no weights."""
