"""NVFP4 numbers and their two on-disk layouts. Only functions from tensors to tensors: no model, no file."""
