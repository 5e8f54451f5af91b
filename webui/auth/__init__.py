"""Login, logout, one's own password and the language of the pages."""
