"""Compiles training programs without running them: memory, collectives, dry run."""
