"""What memory is in use: the meter, the allocator model, and the GPU with a budget."""
