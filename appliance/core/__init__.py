"""Clinical types, errors, settings and process helpers that every other package of the box uses."""
