"""Running a real server on a checkpoint, and understanding what it says."""
