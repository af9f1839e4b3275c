"""Models on the Hugging Face Hub: found, pinned to a commit, and read whole or by ranges of bytes."""
