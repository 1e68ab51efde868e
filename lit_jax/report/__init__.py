"""HTML pages, figures and image grids."""
