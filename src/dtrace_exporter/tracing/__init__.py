"""The tracing side: runs D programs under dtrace(1), and fills the listener table."""
