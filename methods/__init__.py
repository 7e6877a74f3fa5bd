"""The papers: one folder each, all of the same shape."""
