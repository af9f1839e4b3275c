"""Statistics of what passes through a layer during calibration, one module each."""
