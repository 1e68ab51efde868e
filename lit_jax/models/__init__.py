"""Networks (DiT, DiG, U-DiG, PixArt, T5, VAE, Inception), their layers and mixers, and their costs."""
