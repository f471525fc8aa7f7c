"""What is stored: table specifications, Delta tables, run records."""
