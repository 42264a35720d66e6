"""Files, errors and tools: checkpoints, cases, the diff, the command line, and the house itself."""
