"""The command line, one file a command; `main` runs it."""
