"""Data on its way between files, the host and the device: what convert and verify share."""
