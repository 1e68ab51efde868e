"""Programs that are compiled and not run: memory, collectives, dry run."""
