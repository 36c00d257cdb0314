"""The experiments of the LBP-WHT paper, and a comparison of methods that others can extend."""
