"""Mixed precision by budget: the loss of each fused group quantized alone, and the recipes that follow from it."""
