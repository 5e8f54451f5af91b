"""The lifecycle of models on the box: self-test, activation, trial, rollback, withdrawal."""
