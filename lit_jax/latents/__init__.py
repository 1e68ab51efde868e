"""Images and captions to cached latents and features."""
