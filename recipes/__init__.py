"""Recipes that ship with nvquant, one YAML file each."""
