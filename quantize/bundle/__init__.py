"""The bundle of a run: golden cases, model card, gate record and manifest."""
