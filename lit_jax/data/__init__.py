"""Data sets and how they are read: images, tfds, folders, tar shards, captions, cached latents, toys."""
