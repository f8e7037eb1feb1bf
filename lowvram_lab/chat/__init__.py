"""Chapters 07 and 09, talking to a loaded model and judging what it says. Knows no other engine."""
