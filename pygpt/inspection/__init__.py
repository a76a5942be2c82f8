"""A look inside: how a prediction forms, which parts make it, and what changes when one of them is touched."""
