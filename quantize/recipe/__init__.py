"""Recipes list the matrices of a model that are quantized, and their schemes. They use names and roles, no weights."""
