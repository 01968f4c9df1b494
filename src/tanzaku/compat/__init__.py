"""Other libraries' names for Tanzaku, so that programs written for them run as they are."""
