"""LBP-WHT on top of the adapters of another PEFT method."""
