"""The accounts of the box: list, roles, one-time passwords, sessions; for administrators and the technician."""
