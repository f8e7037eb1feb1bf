"""Decode tokens with a loaded model: by its modules, or by one function for all layers, compiled or as CUDA graphs."""
