"""Choose a plan: the best recipe that fits a budget, and what would help where none does."""
