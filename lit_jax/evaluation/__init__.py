"""What `evaluate.py` does: sets of pictures and references in, scores with their recipe cards out."""
