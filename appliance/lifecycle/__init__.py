"""The life of a model on the box: self-test, activation, trial, rollback, withdrawal."""
