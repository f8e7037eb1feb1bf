"""Quantise a model once, streamed layer by layer, into a directory or a file that others open. Knows no GPU."""
