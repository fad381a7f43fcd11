"""The prototype head and its losses."""
