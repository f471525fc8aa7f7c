"""Spark: DataFrame in, DataFrame out; only what Spark Connect offers."""
