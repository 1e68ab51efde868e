"""Encodes images and captions to cached latents and features."""
