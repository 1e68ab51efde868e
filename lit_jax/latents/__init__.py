"""Encodes images and captions, or what a teacher draws, to cached latents and features."""
