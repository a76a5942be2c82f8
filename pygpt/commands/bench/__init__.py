"""The command `pygpt bench`: compare speed with the machine's limits and with other programs."""
