"""Checkpoints: saving, resuming, safe loading, conversion, model zoo."""
