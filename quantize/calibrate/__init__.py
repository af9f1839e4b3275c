"""Calibration: samples, the layer-by-layer walk of the source model, statistics of inputs."""
