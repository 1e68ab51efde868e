"""What `analyze.py` does: attention maps, their similarity and rank, routing, and the loss by timestep."""
