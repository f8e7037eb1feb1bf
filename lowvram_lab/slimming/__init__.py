"""Remove what a model is not needed for: tokens that a text has no use for. Knows no GPU."""
