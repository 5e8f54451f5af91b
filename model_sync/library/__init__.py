"""The central library: keys, roles, publishing, promotion, checks and USB export; used by the central team."""

from model_sync import messages_central as messages_central  # registers the codes of this package and of the fleet
