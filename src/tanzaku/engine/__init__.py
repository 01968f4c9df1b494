"""What makes a pass through a frozen model cheap and changes nothing but rounding (`accelerations`, the registry),
and what it takes of memory. Training and prediction use it alike; nothing here knows of jobs or tasks."""
