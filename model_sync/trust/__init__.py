"""Signed metadata: the TUF client, the check without a network, and protection against rollback."""
