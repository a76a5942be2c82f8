"""Training: parameters, batches, steps and saved states. Does not print."""
