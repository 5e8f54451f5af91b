"""Differences between two versions of a file, which save bytes on a slow link."""
