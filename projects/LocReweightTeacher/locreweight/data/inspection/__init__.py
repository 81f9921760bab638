"""What tools/check_data.py finds in data sets."""
