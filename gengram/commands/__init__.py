"""The `gengram` command: one file per subcommand."""
