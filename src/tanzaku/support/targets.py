"""What torch's losses leave out."""

IGNORED = -100  # in place of a target that is none; cross entropy's own default
