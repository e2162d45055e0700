"""Exports: the on-disk contract, the exporter, and the memory plan."""
