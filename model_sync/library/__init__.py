"""The central team's side: keys, roles, publishing, promotion and checks of a library; its face is ``model_sync.library.library``."""
