"""Numbers of what was recorded; nothing is drawn here."""
