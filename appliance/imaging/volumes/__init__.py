"""Series that a model takes as one volume: geometry of the slices, resampling, segmentation masks."""
