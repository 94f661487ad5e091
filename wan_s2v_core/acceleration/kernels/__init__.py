"""Triton kernels for the steps between products. Its modules import Triton, but for `trial`, which does when asked."""
