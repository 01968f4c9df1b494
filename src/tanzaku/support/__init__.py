"""What any program could use: a value of the thread or task that runs, a reference that a copy follows, seeds, first
derivatives only, modules that are imported when they are used, versions, figures as people read them. Nothing here
knows of adapters."""
