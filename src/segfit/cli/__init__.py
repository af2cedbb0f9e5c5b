"""The command line: thin, reads the environment, prints."""
