"""The parts of tools/fuzz.py: targets, mutations, and parsers of their own to compare with."""
