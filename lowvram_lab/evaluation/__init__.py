"""What compressing costs, measured: a model beside its original, and the figures that an article claims."""
