"""What this machine takes for the parts of a forward pass: measured once, kept. Knows no plan that is to be chosen."""
