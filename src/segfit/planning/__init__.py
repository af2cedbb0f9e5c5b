"""From fingerprint and options to a plan, by explicit rules; touches no file, no device, no clock."""
