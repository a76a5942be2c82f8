"""Files of models, tokens and text: reading, checking, writing."""
