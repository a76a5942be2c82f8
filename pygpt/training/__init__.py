"""Training: parameters, batches, steps and saved states. Prints nothing."""
