"""NVFP4 numbers and their two layouts on disk. The functions map tensors to tensors, without models or files."""
