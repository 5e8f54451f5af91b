"""The fleet as the central server knows it: enrolment, reports, rollouts, and the page; served by ``model_sync.fleet.server``."""
