"""Models and images by the names that a user gives: hub ids, folders, Parquet files. For programs, not for training."""
