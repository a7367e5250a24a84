"""The tracing side: from a D program to dtrace(1), and from its rows to the listener table."""
