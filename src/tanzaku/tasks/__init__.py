"""Tasks: data to batches, batches to a loss, predictions to metrics; one file per task."""
