"""Read, check and write files of models, tokens and text."""
