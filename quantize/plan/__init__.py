"""The plan fixes every output file, header and size before any work, from headers and config alone."""
