"""Workers on several machines."""
