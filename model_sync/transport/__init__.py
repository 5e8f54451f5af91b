"""Bytes over a slow line that breaks: parts, ranges, budgets, and the USB stick; its face is ``model_sync.transport.fetcher``."""
