"""Our own files: Orbax checkpoints, model folders, workdirs, and `load`."""
