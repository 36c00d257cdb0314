"""Loads models and images by names that users give to programs: hub ids, folders, Parquet files."""
