"""DICOM network services of the box."""
