"""The command appliance."""
