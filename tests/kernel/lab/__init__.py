"""Helpers of the cases inside a guest: the exporter, traffic, and independent witnesses."""
