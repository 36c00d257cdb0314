"""What a training step costs: programs that measure it, and what they share."""
