"""The subcommands of `ternary-flux`; what they share with other code lives in the quantizer's own modules."""
