"""Changes to the classes and tables of PEFT, and names that wrappers of other libraries leave in models."""
