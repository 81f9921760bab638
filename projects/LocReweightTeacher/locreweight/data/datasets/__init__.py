"""Data set formats, records and splits."""
