"""The tensors of a model, whatever stores them."""
