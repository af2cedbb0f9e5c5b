"""The model that users share: a folder or one zip of it, written, read back, or fetched from a hub."""
