"""The command `pygpt bench`: speed beside the machine's limits and beside other programs."""
