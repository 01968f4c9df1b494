"""Many candidates, compared honestly: what is run, what the numbers can tell, and the report on it."""
