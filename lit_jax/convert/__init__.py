"""Other people's files, in and out: PyTorch, safetensors, diffusers, Inception weights."""
