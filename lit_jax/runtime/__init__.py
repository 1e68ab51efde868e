"""Base of all commands: errors, local and gs:// paths, resumable work, processes, chips, progress, flags."""
