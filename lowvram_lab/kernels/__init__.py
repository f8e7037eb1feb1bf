"""Kernels of our own for the CPU, compiled once for a machine where it has a C++ compiler."""
