"""Layers with LBP-WHT adapters."""
