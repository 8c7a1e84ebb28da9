"""The matrix product of the model and of the kernels' references."""
