"""What the cases use inside a guest: the exporter, traffic, and witnesses independent of both."""
