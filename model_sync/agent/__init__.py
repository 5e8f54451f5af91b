"""The sync agent: pulls models from the library or a USB stick and hands them to the box."""
