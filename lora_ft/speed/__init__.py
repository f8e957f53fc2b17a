"""How fast the kernels are and that they are right, on the device at hand."""
