"""Run a loaded model: the cache and the decode loop."""
