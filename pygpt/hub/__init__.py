"""Find and download models."""
