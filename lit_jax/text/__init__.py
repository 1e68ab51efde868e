"""From captions to the features that a text-to-image model is conditioned on."""
