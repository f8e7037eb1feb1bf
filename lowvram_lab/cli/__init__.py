"""The `lowvram` command: one file a subcommand. Knows how to ask and to print, nothing else."""
