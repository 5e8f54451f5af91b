"""The reference model ``cxr-pneumonia``: how it was trained, how its bundle is built, and phantoms to show it with."""
