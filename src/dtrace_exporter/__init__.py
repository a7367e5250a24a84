"""Prometheus exporter for TCP listen queues, counted in the kernel by DTrace."""

__version__ = "0.2.0"
