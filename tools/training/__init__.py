"""What tools/train.py is made of: job (options), report (lines, log, pictures), check (llm.c's debug state)."""
