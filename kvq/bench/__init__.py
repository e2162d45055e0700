"""Timing of kernels: against their floor, and against each other in turns."""
