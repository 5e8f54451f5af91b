"""The worker: claims jobs and runs models on images and series."""
