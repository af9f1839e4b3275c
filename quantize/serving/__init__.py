"""Running a real server on a checkpoint, and reading its log and its answers."""
