"""Changes to the forward methods of modules that own adapted layers."""
