"""The gate: image sets, predictions of every variant on every runtime, verdicts, and the selection of what is shipped."""
