"""The model that users share."""
