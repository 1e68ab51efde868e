"""What `evaluate.py` does: sets of images and references in, scores with their recipe cards out."""
