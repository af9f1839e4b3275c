"""Exact changes of a layer's tensors, after which they lose less by quantization."""
