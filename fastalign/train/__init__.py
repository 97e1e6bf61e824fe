"""The loop of each method, one file each: read it top to bottom."""
