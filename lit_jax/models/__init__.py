"""The networks: layers, mixers (one file each), feed-forwards, DiT, DiG, U-DiG, PixArt, T5, VAE, Inception,
and what they cost."""
