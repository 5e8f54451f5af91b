"""The web process itself: gunicorn, slow clients, access rules and error answers."""
