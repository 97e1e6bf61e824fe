"""Data: file formats, tokens with loss spans, packing, and the built-in synthetic task."""
