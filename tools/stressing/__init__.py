"""What tools/stress.py is made of: one module for each of its four kinds of stress."""
