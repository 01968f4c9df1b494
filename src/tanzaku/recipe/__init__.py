"""A run's recipe, of which every key is a flag too: the schema, YAML as it is read, and what is wrong with either in
one line."""
