"""Models: where they come from, how they are loaded, generated with, described and exported."""
