"""The plan: every output file, header and byte, fixed before any work, from headers and config alone."""
