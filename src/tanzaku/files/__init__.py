"""Files whole or not at all: written beside and renamed, with a lock on whose they are, and read without trust in what
their settings may cost. What stands in them is known to `storage`, `tasks` and `recipe`."""
