"""Ingest: the only way by which an image gets into the store."""
