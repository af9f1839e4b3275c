"""Proof of a checkpoint: its structure and bytes, against its source and against the rules of the server."""
