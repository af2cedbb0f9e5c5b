"""Running work over many cases."""
