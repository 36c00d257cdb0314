"""Number formats of the products in a backward pass."""
