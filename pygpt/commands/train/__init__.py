"""The command `pygpt train`."""
