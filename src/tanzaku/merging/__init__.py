"""An adapter folded into the base's weights (`merge`), one adapter of several (`combine`), and one as
another method's (`convert`)."""
