"""The command `pygpt profile`: show where GPT-2 spends its time."""
