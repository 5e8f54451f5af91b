"""Series that models read as a whole: where their slices lie, the volume a model takes, and masks and millilitres in the patient."""
