"""Settings: YAML and key=value into frozen dataclasses, and the guideline as data."""
