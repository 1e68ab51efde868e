"""Data sets: images, tfds, folders, tar shards, captions, cached latents, toys; and the order of examples."""
