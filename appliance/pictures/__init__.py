"""Pixels: looked at before they are decoded, decoded, made the picture that a person sees, and a picture made a DICOM file."""
