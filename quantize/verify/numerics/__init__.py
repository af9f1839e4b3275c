"""The stage `numerics`: the effect of quantization on the model's predictions, layer by layer and token by token."""
