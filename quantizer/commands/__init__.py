"""The subcommands of `ternary-flux`, a module each."""
