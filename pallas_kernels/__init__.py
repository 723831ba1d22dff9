"""Pallas GPU kernels of the hybrid attention operator."""
