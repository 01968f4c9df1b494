"""What any program could use: a value of the thread or task that runs, a reference that a copy follows, seeds, modules
that are imported when they are used. Nothing here knows of adapters."""
