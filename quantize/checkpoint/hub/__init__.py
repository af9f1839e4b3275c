"""Models on the Hugging Face Hub: found, pinned to a commit, and read as complete files or by ranges of bytes."""
