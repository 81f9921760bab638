"""Inspection of data sets for ``tools/check_data.py``."""
