"""nvquant: turn a BF16 Hugging Face checkpoint into an NVFP4 checkpoint that vLLM serves, and prove it."""

__version__ = "0.1.0"
