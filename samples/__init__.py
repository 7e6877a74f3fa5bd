"""Small real data sets with their licences: what the demos and tests run on (see README.md here)."""
