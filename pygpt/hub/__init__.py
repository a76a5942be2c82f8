"""Find models."""
