"""Programs that measure what a training step costs, and the code that they share."""
