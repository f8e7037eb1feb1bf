"""What the weights of a model are like, and what each format of each of them costs the output."""
