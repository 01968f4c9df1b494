"""Training: what a job is, the step that jobs share, and the loop around it."""
