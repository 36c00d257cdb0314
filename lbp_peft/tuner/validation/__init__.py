"""Checks of the user's settings. Each of them raises an error or warns, and names a remedy."""
