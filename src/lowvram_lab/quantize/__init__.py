"""Make weights smaller: solvers choose the codes, linear.py runs them over existing kernels."""
