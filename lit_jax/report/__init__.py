"""HTML reports and image grids."""
