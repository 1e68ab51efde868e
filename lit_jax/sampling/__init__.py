"""From weights to images: noise of an image's own, one program for all of them, grids, files and .npz
sets."""
