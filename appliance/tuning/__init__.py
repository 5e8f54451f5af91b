"""Measuring at work: how a model runs best on this box, asked for, measured beside the reading, and taken in one transaction."""
