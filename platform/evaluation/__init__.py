"""Metrics that several methods share."""
