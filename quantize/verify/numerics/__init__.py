"""The stage `numerics`: what quantization does to the model's predictions, layer by layer and token by token."""
