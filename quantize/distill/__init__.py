"""Distillation: block scales and norms of a checkpoint, trained to the source's logits and judged by a gate."""
