"""The processes of the box and their supervision."""
