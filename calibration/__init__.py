"""Calibration text that ships with nvquant, and specs of Hub data sets."""
