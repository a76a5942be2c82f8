"""The `pygpt` command and its subcommands. Nothing else in the package imports them."""
