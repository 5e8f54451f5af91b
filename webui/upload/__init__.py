"""Uploads: form, protocol, storage and ingest of complete files."""
