"""The command `pygpt profile`: where the time goes."""
