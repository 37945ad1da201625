"""Data and metrics that experiments share, a file a task."""
