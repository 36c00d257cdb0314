"""What the example programs share: options, data, methods, the training loop, measurements and the report."""
