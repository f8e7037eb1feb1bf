"""How others store quantised weights, and which format here takes their codes as they lie."""
