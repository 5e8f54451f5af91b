"""The central server: enrolment and reports of boxes, rollouts, the fleet page, and the command ``model-library``."""
