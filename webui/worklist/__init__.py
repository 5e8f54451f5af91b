"""The worklist, its changes, and which studies are analysed first."""
