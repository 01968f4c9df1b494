"""An adapter folded into the base's weights (`merge`), and one adapter of several (`combine`)."""
