"""The central library: keys, roles, publishing, promotion, checks and USB export; used by the central team."""
