"""Drawing, figures and the report."""
