"""Sweeps: many runs of one experiment as a Ray Tune study."""
