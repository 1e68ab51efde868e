"""From weights to images: each image's own noise, one program for all, grids, files and .npz sets."""
