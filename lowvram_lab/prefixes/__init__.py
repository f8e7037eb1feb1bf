"""Prompts' keys and values that are remembered: kept in blocks, in RAM and on disk, and put back to the bit."""
