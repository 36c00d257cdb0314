"""Checks of what a user asks for: each refuses with an error, or warns, and names a remedy."""
