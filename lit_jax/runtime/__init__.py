"""What a program needs on any machine: errors, paths (local, gs://), files and parts that resume, processes,
chips, progress, command lines. Knows no model."""
