"""Load a model as its plan says: weights, layers that multiply them, places, the KV cache."""
