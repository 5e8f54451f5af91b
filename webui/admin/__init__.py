"""The status page, the list of refused files and the health check."""
