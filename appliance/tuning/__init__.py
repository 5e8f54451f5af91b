"""Tuning: measure the candidates of a model on this box and choose one."""
