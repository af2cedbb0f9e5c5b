"""From a network specification to a module."""
